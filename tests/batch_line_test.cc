// BatchLine: lines of an OpenAI Batch file in, their answers out, with requests that are answered by hand.
#include "coordinator/batch_line.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/generate_output.h"
#include "nlohmann/json.hpp"
#include "octet/v1/inference_service.pb.h"
#include "tests/fake_model.h"
#include "tests/toy_chat.h"

namespace octet {
namespace {

using Json = nlohmann::ordered_json;

const ServedModel& llama() {
  static const ServedModel* const model = new ServedModel(fake_model(toy(kToyLlama31)));
  return *model;
}

const BatchFacts& facts() {
  static const BatchFacts* const facts = new BatchFacts{
      .job_id = "ab12", .created = 1700000000, .system_fingerprint = "n1", .seed = 7, .chat_date = "01 Jan 2026"};
  return *facts;
}

BatchLine read(std::string_view text, int64_t number = 3, const ServedModel& model = llama()) {
  return BatchLine::read(text, number, facts(), model);
}

std::string line_with(const std::string& url, const std::string& body) {
  return absl::StrCat(R"({"custom_id":"r1","method":"POST","url":")", url, R"(","body":)", body, "}");
}
std::string chat_line(const std::string& fields) {
  return line_with("/v1/chat/completions", absl::StrCat(R"({"model":"fake","messages":[{"role":"user","content":"Hi"}])",
                                                        fields.empty() ? "" : ",", fields, "}"));
}
std::string completion_line(const std::string& fields) {
  return line_with("/v1/completions", absl::StrCat(R"({"model":"fake",)", fields, "}"));
}

constexpr float kLogprob = -0.1f;

// What a model that says `ids` makes of a request, as the engine would tell it.
std::vector<TokenEvent> events_of(const AcceptedRequest& accepted, const std::vector<int32_t>& ids, bool ended) {
  std::vector<TokenEvent> events;
  const auto scored = [](int32_t token, int32_t top) {
    SampledToken sampled{.slot = 0, .chosen = {token, kLogprob}, .top = {}};
    for (int32_t t = 0; t < top; ++t) sampled.top.push_back({'a' + t, -0.5f - static_cast<float>(t)});
    return sampled;
  };
  for (int32_t output = 0; output < accepted.request.outputs; ++output) {
    for (size_t i = 0; i < ids.size(); ++i) {
      TokenEvent event{.output_index = static_cast<uint32_t>(output)};
      const SampledToken sampled = scored(ids[i], accepted.request.sampling.top_logprobs);
      event.token = sampled.chosen;
      event.top = sampled.top;
      if (i == 0 && output == 0 && accepted.request.prompt_logprobs.has_value()) {
        for (size_t p = 1; p < accepted.request.prompt.size(); ++p) {
          event.prompt_logprobs.push_back(scored(accepted.request.prompt[p], *accepted.request.prompt_logprobs));
        }
      }
      if (i + 1 == ids.size()) event.finish = ended ? FinishReason::kEndToken : FinishReason::kLength;
      events.push_back(std::move(event));
    }
  }
  return events;
}

// Answers each request with the tokens, the last of which is an end token if `ended`.
void run(BatchLine* line, const std::vector<int32_t>& ids, bool ended = true, const ServedModel& model = llama()) {
  for (size_t i = 0; i < line->requests().size(); ++i) {
    const AcceptedRequest& accepted = line->requests()[i];
    GenerateOutputs outputs(accepted, model.tokenizer);
    for (const TokenEvent& event : events_of(accepted, ids, ended)) outputs.absorb(event);
    for (v1::GenerateResponse message; outputs.take(&message);) line->add(i, message);
  }
}

std::vector<int32_t> says(const std::string& text, const ServedModel& model = llama()) {
  std::vector<int32_t> ids = model.tokenizer.encode(text, false);
  ids.push_back(*model.tokenizer.special_id("<|eot_id|>"));
  return ids;
}

Json answer_of(BatchLine line, const std::vector<int32_t>& ids, bool ended = true) {
  EXPECT_FALSE(line.failed()) << line.answer();
  if (line.failed()) return Json::parse(line.answer());
  run(&line, ids, ended);
  return Json::parse(line.answer());
}

TEST(BatchLine, AnswersAChatAsOpenAiDoes) {
  BatchLine line = read(chat_line(""));
  ASSERT_EQ(line.requests().size(), 1u);
  EXPECT_EQ(line.custom_id(), "r1");
  run(&line, says("Hi"));
  EXPECT_EQ(line.completion_tokens(), 3);
  EXPECT_EQ(
      line.answer(),
      R"({"id":"batch_req_0dfe404d091fee05481a50ed1e777fc5","custom_id":"r1","response":{"status_code":200,)"
      R"("request_id":"7cd7850ef4bb653e1d0af3d878d54d14","body":{"id":"chatcmpl-79fef411aa202e087913d9159db7f94f",)"
      R"("object":"chat.completion","created":1700000000,"model":"fake","system_fingerprint":"n1","choices":[{"index":0,)"
      R"("message":{"role":"assistant","content":"Hi","refusal":null},"logprobs":null,"finish_reason":"stop"}],)"
      R"("usage":{"prompt_tokens":99,"completion_tokens":3,"total_tokens":102}}},"error":null})");
}

TEST(BatchLine, AnswersCompletionsOfSeveralPromptsInTheirOrder) {
  const Json answer = answer_of(read(completion_line(R"("prompt":["ab",[99,100]],"n":2,"echo":true)")), says("!"));
  const Json& body = answer["response"]["body"];
  EXPECT_EQ(body["object"], "text_completion");
  EXPECT_EQ(body["choices"].dump(), R"([{"index":0,"text":"ab!","logprobs":null,"finish_reason":"stop"},)"
                                    R"({"index":1,"text":"ab!","logprobs":null,"finish_reason":"stop"},)"
                                    R"({"index":2,"text":"cd!","logprobs":null,"finish_reason":"stop"},)"
                                    R"({"index":3,"text":"cd!","logprobs":null,"finish_reason":"stop"}])");
  EXPECT_EQ(body["usage"].dump(), R"({"prompt_tokens":4,"completion_tokens":8,"total_tokens":12})");
}

TEST(BatchLine, GivesACompletionsLogprobsAlignedWithItsTokens) {
  const Json answer =
      answer_of(read(completion_line(R"("prompt":"aé","echo":true,"logprobs":1,"max_tokens":1)")), {0xC3}, false);
  EXPECT_EQ(answer["response"]["body"]["choices"][0]["text"], "aé\uFFFD");
  EXPECT_EQ(answer["response"]["body"]["choices"][0]["logprobs"].dump(),
            R"({"tokens":["a","bytes:\\xc3","bytes:\\xa9","bytes:\\xc3"],"token_logprobs":[null,-0.1,-0.1,-0.1],)"
            R"("top_logprobs":[null,{"a":-0.5,"bytes:\\xc3":-0.1},{"a":-0.5,"bytes:\\xa9":-0.1},)"
            R"({"a":-0.5,"bytes:\\xc3":-0.1}],"text_offset":[0,1,1,2]})");
}

TEST(BatchLine, GivesAChatsLogprobsWithTheirBytes) {
  const Json answer = answer_of(read(chat_line(R"("logprobs":true,"top_logprobs":1)")), {0xC3, 0xA9}, false);
  EXPECT_EQ(answer["response"]["body"]["choices"][0]["message"]["content"], "é");
  EXPECT_EQ(answer["response"]["body"]["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(answer["response"]["body"]["choices"][0]["logprobs"].dump(),
            R"({"content":[{"token":"�","logprob":-0.1,"bytes":[195],)"
            R"("top_logprobs":[{"token":"a","logprob":-0.5,"bytes":[97]}]},{"token":"�","logprob":-0.1,"bytes":[169],)"
            R"("top_logprobs":[{"token":"a","logprob":-0.5,"bytes":[97]}]}],"refusal":null})");
}

}  // namespace
}  // namespace octet
