// How octet generate shows an answer: text as it comes, or one JSON object on one line for each output when all has
// come.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "octet/v1/inference_service.pb.h"

namespace octet {

class AnswerPrinter {
 public:
  virtual ~AnswerPrinter() = default;
  virtual void take(const v1::GenerateResponse& response) = 0;
  // The answer is whole, or, with `whole` false, will not come any further.
  virtual void end(bool whole) = 0;
};

std::unique_ptr<AnswerPrinter> make_text_printer(bool several_outputs);
std::unique_ptr<AnswerPrinter> make_json_printer();

}  // namespace octet
