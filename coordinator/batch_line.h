// BatchLine: one line of an OpenAI Batch input file, and the line that answers it.
//
// In:  {"custom_id":"r1","method":"POST","url":"/v1/chat/completions","body":{...}}, url also /v1/completions. What of
// a
//      body is read, ignored and refused says openai_request.h.
// Out:
// {"id":"batch_req_...","custom_id":"r1","response":{"status_code":200,"request_id":"...","body":{...}},"error":null}
// Errors are told as OpenAI tells them. What the line itself brought about is an HTTP answer of another status_code,
// {"error":{"message","type","param","code"}} its body and "error" null; what happened to a good line (an engine crash)
// has "response" null and "error":{"code","message"}. custom_id is null where the line has no readable one; the message
// then says the line's number.
//
// Invariant: the answer is a function of the line, its number, the job's facts and the model's tokens: a line that is
// run again, by another server or beside other lines, is answered with the same bytes, all of them ASCII.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/batch/batch_input.h"
#include "coordinator/generate_request.h"
#include "coordinator/openai_answer.h"
#include "coordinator/openai_request.h"
#include "coordinator/served_model.h"

namespace octet {

// What all lines of a job share. Constant over the job's life, restarts included.
struct BatchFacts {
  std::string job_id;              // ids of answers are made of it and the line's number
  int64_t created = 0;             // Unix seconds: the job's start
  std::string system_fingerprint;  // the numerics id
  uint64_t seed = 0;               // with the line's number and the prompt's index, the seed of lines that bring none
  std::string chat_date;           // "26 Jul 2024", for chat formats that would ask the clock
  SamplingDefaults defaults;
};

// One thread at a time.
class BatchLine {
 public:
  // Never fails: a line that cannot be run has failed() and no requests(). `text` is the line without its \n, `number`
  // its place in the file from 1 on; a \r after it and a byte order mark before it are not minded. A key twice in one
  // object is an error: nobody can tell which one was meant. Takes a while: it tokenises.
  // REQUIRES: `facts` and `model` outlive the line.
  static BatchLine read(std::string_view text, int64_t number, const BatchFacts& facts, const ServedModel& model);

  // One per prompt of the line, to be run once each: the caller may move from them.
  std::vector<AcceptedRequest>& requests() { return requests_; }

  // The next message of requests()[prompt]'s GenerateOutputs.
  void add(size_t prompt, const v1::GenerateResponse& message) { answer_.add(prompt, message); }

  // The line ends with this status, which is not OK, whatever its prompts have brought. The first one counts. An empty
  // `code` is the status's own: "context_length_exceeded" for OUT_OF_RANGE, "unavailable", ...
  void fail(const absl::Status& status, std::string_view code = {});
  bool failed() const { return !error_.empty(); }

  // The output line, without the newline. REQUIRES: failed(), or the last message of every request was added.
  std::string answer() const;

  const std::optional<std::string>& custom_id() const { return custom_id_; }
  // Of the messages so far.
  int64_t prompt_tokens() const { return answer_.prompt_tokens(); }
  int64_t completion_tokens() const { return answer_.completion_tokens(); }

 private:
  BatchLine(int64_t number, const BatchFacts& facts, const ServedModel& model)
      : number_(number), facts_(&facts), model_(&model) {}

  absl::Status accept(const nlohmann::ordered_json& line);
  uint64_t seed_of(size_t prompt) const;
  std::string hash_of(std::string_view what) const;
  std::string line_of(const nlohmann::ordered_json& response, const nlohmann::ordered_json& error) const;

  int64_t number_;
  const BatchFacts* facts_;
  const ServedModel* model_;
  std::optional<std::string> custom_id_;
  std::vector<AcceptedRequest> requests_;
  OpenAiAnswer answer_;
  std::string error_;  // the whole line
};

}  // namespace octet
