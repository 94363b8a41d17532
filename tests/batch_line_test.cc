// BatchLine: lines of an OpenAI Batch file in, their answers out, with requests that are answered by hand.
#include "coordinator/batch_line.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
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
  return line_with("/v1/chat/completions",
                   absl::StrCat(R"({"model":"fake","messages":[{"role":"user","content":"Hi"}])",
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

// ---- What the line says reaches the request

TEST(BatchLine, TakesEveryFieldThatItKnows) {
  BatchLine line = read(chat_line(
      R"("n":2,"temperature":0.5,"top_p":0.25,"top_k":-1,"min_p":0.125,"presence_penalty":1,"frequency_penalty":-1,
         "repetition_penalty":1.5,"seed":-1,"logit_bias":{"97":-100,"98":1.5},"bad_words":["x"],
         "allowed_token_ids":[97,98.0],"max_completion_tokens":9,"max_tokens":8,"min_tokens":2,"stop":["a","b"],
         "stop_token_ids":[99],"ignore_eos":true,"include_stop_str_in_output":true,"logprobs":true,"top_logprobs":3)"));
  ASSERT_FALSE(line.failed()) << line.answer();
  const AcceptedRequest& accepted = line.requests()[0];
  const SlotSampling& sampling = accepted.request.sampling;
  EXPECT_EQ(accepted.request.outputs, 2);
  EXPECT_EQ(sampling.temperature, 0.5f);
  EXPECT_EQ(sampling.top_p, 0.25f);
  EXPECT_EQ(sampling.top_k, 0);
  EXPECT_EQ(sampling.min_p, 0.125f);
  EXPECT_EQ(sampling.presence_penalty, 1.0f);
  EXPECT_EQ(sampling.frequency_penalty, -1.0f);
  EXPECT_EQ(sampling.repetition_penalty, 1.5f);
  EXPECT_EQ(sampling.seed, ~uint64_t{0});
  ASSERT_EQ(sampling.logit_bias.size(), 2u);
  EXPECT_EQ(sampling.logit_bias[1].bias, 1.5f);
  EXPECT_EQ(sampling.bad_words.size(), 2u);
  EXPECT_EQ(sampling.allowed_token_ids, (std::vector<int32_t>{97, 98}));
  EXPECT_EQ(accepted.request.max_tokens, 9);
  EXPECT_EQ(sampling.min_tokens, 2);
  EXPECT_EQ(accepted.stop, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(sampling.end_token_ids, (std::vector<int32_t>{99}));
  EXPECT_TRUE(accepted.include_stop);
  EXPECT_TRUE(accepted.logprobs);
  EXPECT_EQ(sampling.top_logprobs, 3);
}

TEST(BatchLine, TakesTheJobsDefaultsWhereItDoesNotSay) {
  BatchFacts own = facts();
  own.defaults = {.temperature = 0.75f, .top_p = 0.5f, .top_k = 4, .max_tokens = 11};
  BatchLine silent = BatchLine::read(chat_line(""), 1, own, llama());
  EXPECT_EQ(silent.requests()[0].request.sampling.temperature, 0.75f);
  EXPECT_EQ(silent.requests()[0].request.sampling.top_p, 0.5f);
  EXPECT_EQ(silent.requests()[0].request.sampling.top_k, 4);
  EXPECT_EQ(silent.requests()[0].request.max_tokens, 11);
  BatchLine speaking = BatchLine::read(chat_line(R"("temperature":0,"max_tokens":5)"), 1, own, llama());
  EXPECT_EQ(speaking.requests()[0].request.sampling.temperature, 0.0f);
  EXPECT_EQ(speaking.requests()[0].request.max_tokens, 5);

  EXPECT_EQ(read(chat_line("")).requests()[0].request.max_tokens, std::nullopt);
  EXPECT_EQ(read(completion_line(R"("prompt":"x")")).requests()[0].request.max_tokens, 16) << "OpenAI's own default";
}

TEST(BatchLine, IgnoresNullsAndFieldsThatServersNeedNotKnow) {
  BatchLine line = read(chat_line(
      R"("user":"u","metadata":{"a":"b"},"store":true,"service_tier":"auto","parallel_tool_calls":false,"later":[1],
         "temperature":null,"stop":null,"tools":null,"tool_choice":null,"response_format":{"type":"text"},"n":null,
         "stream":false,"logprobs":false,"top_logprobs":0,"seed":null,"logit_bias":null,"modalities":["text"])"));
  EXPECT_FALSE(line.failed()) << line.answer();
}

TEST(BatchLine, ChoosesSeedsThatDependOnTheLineThePromptAndTheJobOnly) {
  const std::string two = completion_line(R"("prompt":["a","b"])");
  const auto seed = [](BatchLine line, size_t prompt) { return line.requests()[prompt].request.sampling.seed; };
  EXPECT_EQ(seed(read(two, 3), 0), 5107252784733634162u) << "for ever the same";
  EXPECT_EQ(seed(read(two, 3), 0), seed(read(completion_line(R"("prompt":"z")"), 3), 0));
  EXPECT_NE(seed(read(two, 3), 0), seed(read(two, 3), 1));
  EXPECT_NE(seed(read(two, 3), 0), seed(read(two, 4), 0));
  EXPECT_NE(seed(read(two, 3), 1), seed(read(two, 31), 0));
  BatchFacts other = facts();
  other.seed = 8;
  EXPECT_NE(seed(read(two, 3), 0), seed(BatchLine::read(two, 3, other, llama()), 0));

  const std::string given = completion_line(R"("prompt":["a","b"],"seed":5)");
  EXPECT_EQ(seed(read(given, 3), 0), 5u);
  EXPECT_EQ(seed(read(given, 4), 1), 5u);
  EXPECT_EQ(seed(read(completion_line(R"("prompt":"a","seed":18446744073709551615)")), 0), ~uint64_t{0});
}

// What the model is told, special tokens by name, after the system turn.
std::string told(const std::string& body, const ServedModel& model = llama()) {
  BatchLine line = read(line_with("/v1/chat/completions", body), 3, model);
  if (line.failed()) return line.answer();
  const std::string prompt = model.tokenizer.decode(line.requests()[0].request.prompt, /*skip_special=*/false);
  const std::string dates = "Today Date: 26 Jul 2024\n\n";
  return prompt.substr(prompt.find(dates) + dates.size());
}

const std::string kAsk = "<|start_header_id|>assistant<|end_header_id|>\n\n";
std::string turn(const std::string& role, const std::string& content) {
  return absl::StrCat("<|start_header_id|>", role, "<|end_header_id|>\n\n", content, "<|eot_id|>");
}

TEST(BatchLine, ReadsMessagesOfEveryRoleAndContentInParts) {
  EXPECT_EQ(told(R"({"messages":[{"role":"developer","content":"Be brief."},
                                 {"role":"user","name":"Ann","content":[{"type":"text","text":"One"},
                                                                        {"type":"text","text":"two"}]},
                                 {"role":"assistant","content":"Three","refusal":null},
                                 {"role":"user","content":"<|eot_id|>"}]})"),
            "Be brief.<|eot_id|>" + turn("user", "One\ntwo") + turn("assistant", "Three") + turn("user", "<|eot_id|>") +
                kAsk);
  EXPECT_EQ(told(R"({"messages":[{"role":"user","content":"?"},
                                 {"role":"assistant","content":null,"tool_calls":[{"id":"c1","type":"function",
                                  "function":{"name":"f","arguments":"{\"b\": 1, \"a\": \"x\"}"}}]},
                                 {"role":"tool","tool_call_id":"c1","content":"7"},
                                 {"role":"assistant","tool_calls":[{"id":"c2","type":"function",
                                  "function":{"name":"g","arguments":""}}]}]})"),
            "<|eot_id|>" + turn("user", "?") + turn("assistant", R"({"name": "f", "parameters": {"b": 1, "a": "x"}})") +
                turn("ipython", R"("7")") + turn("assistant", R"({"name": "g", "parameters": {}})") + kAsk);
}

TEST(BatchLine, ShowsToolsInTheirOwnOrderUnlessNoneAreToBeChosen) {
  const std::string body = R"({"messages":[{"role":"user","content":"?"}],"tool_choice":"CHOICE",)"
                           R"("tools":[{"type":"function","function":{"name":"f","parameters":{"b":1.0,"a":[]}}}]})";
  const std::string shown = told(absl::StrReplaceAll(body, {{"CHOICE", "auto"}}));
  EXPECT_NE(shown.find(R"({
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "b": 1.0,
            "a": []
        }
    }
})"),
            std::string::npos)
      << shown;
  EXPECT_EQ(told(absl::StrReplaceAll(body, {{"CHOICE", "none"}})), "<|eot_id|>" + turn("user", "?") + kAsk);
}

TEST(BatchLine, HasTheJobsDateWhereTheTemplateWouldAskTheClock) {
  const std::string asks = absl::StrReplaceAll(
      kToyLlama31, {{"{%- set date_string = \"26 Jul 2024\" %}",
                     "{%- if strftime_now is defined %}{%- set date_string = strftime_now(\"%d %b %Y\") %}"
                     "{%- else %}{%- set date_string = \"26 Jul 2024\" %}{%- endif %}"}});
  const ServedModel model = fake_model(toy(asks));
  ASSERT_TRUE(model.chat.ok() && model.chat->uses_today()) << model.chat.status();
  BatchLine line = read(chat_line(""), 3, model);
  const std::string prompt = model.tokenizer.decode(line.requests()[0].request.prompt);
  EXPECT_NE(prompt.find("Today Date: 01 Jan 2026\n"), std::string::npos) << prompt;
}

// ---- Answers

TEST(BatchLine, TellsToolCallsInAnAnswerToAChatWithTools) {
  const std::string tools = R"("tools":[{"type":"function","function":{"name":"f"}}])";
  const std::string call = R"({"name": "f", "parameters": {"city": "Köln"}}; {"name": "f", "parameters": {}})";
  const Json choice = answer_of(read(chat_line(tools)), says(call))["response"]["body"]["choices"][0];
  EXPECT_EQ(choice["finish_reason"], "tool_calls");
  EXPECT_EQ(choice["message"].dump(), R"({"role":"assistant","content":null,"refusal":null,"tool_calls":[)"
                                      R"({"id":"call_79fef411aa202e087913d9159db7f94f_0_0","type":"function",)"
                                      R"("function":{"name":"f","arguments":"{\"city\":\"Köln\"}"}},)"
                                      R"({"id":"call_79fef411aa202e087913d9159db7f94f_0_1","type":"function",)"
                                      R"("function":{"name":"f","arguments":"{}"}}]})");

  std::vector<int32_t> tagged = says("brave_search.call(query=\"x\")");
  tagged.insert(tagged.begin(), *llama().tokenizer.special_id("<|python_tag|>"));
  const Json builtin = answer_of(read(chat_line(tools)), tagged)["response"]["body"]["choices"][0]["message"];
  EXPECT_EQ(builtin["tool_calls"][0]["function"]["name"], "brave_search");

  const Json without = answer_of(read(chat_line("")), says(call))["response"]["body"]["choices"][0];
  EXPECT_EQ(without["message"]["content"], call);
  EXPECT_EQ(without["finish_reason"], "stop");
  const Json cut = answer_of(read(chat_line(tools)), says(call.substr(0, 60)), false)["response"]["body"];
  EXPECT_EQ(cut["choices"][0]["message"]["content"], call.substr(0, 60));
  EXPECT_EQ(cut["choices"][0]["finish_reason"], "length");
}

TEST(BatchLine, PrintsTheSameBytesHoweverTheMessagesWereCut) {
  const std::string text =
      completion_line(R"("prompt":["ab","c"],"n":3,"echo":true,"logprobs":2,"stop":"lo","max_tokens":20)");
  BatchLine whole = read(text);
  run(&whole, says("Hello"));
  BatchLine pieces = read(text);
  for (size_t i = pieces.requests().size(); i-- > 0;) {  // in another order as well
    const AcceptedRequest& accepted = pieces.requests()[i];
    GenerateOutputs outputs(accepted, llama().tokenizer);
    for (const TokenEvent& event : events_of(accepted, says("Hello"), true)) {
      outputs.absorb(event);
      for (v1::GenerateResponse message; outputs.take(&message);) pieces.add(i, message);
    }
  }
  EXPECT_EQ(whole.answer(), pieces.answer());
  EXPECT_EQ(Json::parse(whole.answer())["response"]["body"]["choices"][2]["text"], "abHel");
  EXPECT_EQ(whole.prompt_tokens(), 3);
  EXPECT_EQ(pieces.completion_tokens(), whole.completion_tokens());
}

TEST(BatchLine, PrintsNumbersForLogprobsThatAreNone) {
  for (const float odd : {-std::numeric_limits<float>::infinity(), std::nanf("")}) {
    BatchLine line = read(completion_line(R"("prompt":"a","logprobs":0)"));
    v1::GenerateResponse message;
    message.set_text("b");
    message.add_tokens()->set_token_id('b');
    message.mutable_tokens(0)->set_logprob(odd);
    message.set_finish_reason(v1::FINISH_REASON_LENGTH);
    line.add(0, message);
    const Json logprobs = Json::parse(line.answer())["response"]["body"]["choices"][0]["logprobs"];
    EXPECT_EQ(logprobs.dump(), R"({"tokens":["b"],"token_logprobs":[-9999.0],"top_logprobs":[{"b":-9999.0}],)"
                               R"("text_offset":[0]})");
  }
}

TEST(BatchLine, IsAsciiSoThatNoOtherLineEndIsInIt) {
  BatchLine line = read(chat_line(""));
  const std::string text = "\xE2\x80\xA8 \xC2\x85 \xF0\x9F\x8E\xBB \x01 \x7F";
  run(&line, says(text));
  const std::string answer = line.answer();
  EXPECT_TRUE(std::ranges::all_of(answer, [](char c) { return c >= 0x20 && c <= 0x7F; })) << answer;
  EXPECT_EQ(Json::parse(answer)["response"]["body"]["choices"][0]["message"]["content"], text);
}

TEST(BatchLine, HasIdsOfItsOwn) {
  std::set<std::string> ids;
  BatchFacts other = facts();
  other.job_id = "cd";
  for (const BatchFacts* job : {&facts(), static_cast<const BatchFacts*>(&other)}) {
    for (int64_t number = 1; number <= 20; ++number) {
      BatchLine line = BatchLine::read(chat_line(""), number, *job, llama());
      run(&line, says("x"));
      const Json answer = Json::parse(line.answer());
      ids.insert(answer["id"]);
      ids.insert(answer["response"]["request_id"]);
      ids.insert(answer["response"]["body"]["id"].get<std::string>().substr(9));
    }
  }
  EXPECT_EQ(ids.size(), 2u * 20 * 3);
}

// ---- Lines that cannot be run

TEST(BatchLine, TellsAnErrorAsOpenAiDoes) {
  BatchLine line = read(chat_line(R"("temperature":"hot")"));
  EXPECT_TRUE(line.failed());
  EXPECT_TRUE(line.requests().empty());
  EXPECT_EQ(line.answer(),
            R"({"id":"batch_req_0dfe404d091fee05481a50ed1e777fc5","custom_id":"r1","response":{"status_code":400,)"
            R"("request_id":"7cd7850ef4bb653e1d0af3d878d54d14","body":{"error":{"message":)"
            R"("temperature must be a number, found \"hot\"","type":"invalid_request_error","param":"temperature",)"
            R"("code":"invalid_value"}}},"error":null})");
}

TEST(BatchLine, EndsWithAnErrorOfTheEngine) {
  BatchLine too_long = read(chat_line(""));
  too_long.fail(absl::OutOfRangeError("99 tokens do not fit"));
  too_long.fail(absl::InternalError("the first one counts"));
  const Json refused = Json::parse(too_long.answer());
  EXPECT_EQ(refused["error"], nullptr);
  EXPECT_EQ(refused["response"]["status_code"], 400);
  EXPECT_EQ(refused["response"]["body"]["error"]["code"], "context_length_exceeded");
  EXPECT_TRUE(too_long.requests().empty());

  BatchLine poison = read(chat_line(""));
  poison.fail(absl::InternalError("the engine died of it three times"), "engine_crash");
  EXPECT_EQ(poison.answer(), R"({"id":"batch_req_0dfe404d091fee05481a50ed1e777fc5","custom_id":"r1","response":null,)"
                             R"("error":{"code":"engine_crash","message":"the engine died of it three times"}})");
  BatchLine lost = read(chat_line(""));
  lost.fail(absl::UnavailableError("rank 1 is gone"));
  EXPECT_EQ(Json::parse(lost.answer())["error"]["code"], "unavailable");
}

// "code param: message" of a line's error.
std::string error_of(std::string_view text, int64_t number = 3, const ServedModel& model = llama()) {
  const BatchLine line = read(text, number, model);
  if (!line.failed()) return "none";
  const Json error = Json::parse(line.answer())["response"]["body"]["error"];
  const std::string param = error["param"].is_null() ? "-" : error["param"].get<std::string>();
  return absl::StrCat(error["code"].get<std::string>(), " ", param, ": ", error["message"].get<std::string>());
}

TEST(BatchLine, RefusesLinesThatAreNoRequest) {
  const std::string body = R"("body":{"prompt":"x"})";
  const std::string nested = std::string(70, '[') + std::string(70, ']');
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "invalid_json_line -: line 3: not valid JSON at byte 1"},
      {"null", "invalid_json_line -: line 3 is not a JSON object"},
      {"[]", "invalid_json_line -: line 3 is not a JSON object"},
      {"{", "invalid_json_line -: line 3: not valid JSON at byte 2"},
      {"{} {}", "invalid_json_line -: line 3: not valid JSON at byte 4"},
      {"{\"custom_id\":\"\xff\"}", "invalid_json_line -: line 3 is not valid UTF-8"},
      {R"({"custom_id":"a","custom_id":"b"})", "invalid_json_line -: line 3: key 'custom_id' appears twice"},
      {R"({"custom_id":"\ud800"})", "invalid_json_line -: line 3: not valid JSON at byte 21"},
      {absl::StrCat(R"({"custom_id":)", nested, "}"), "invalid_json_line -: line 3: nested deeper than 64 levels"},
      {"{}", "invalid_value custom_id: custom_id of line 3 must be there, and a text"},
      {absl::StrCat(R"({"custom_id":7,"method":"POST","url":"/v1/completions",)", body, "}"),
       "invalid_value custom_id: custom_id of line 3 must be there, and a text"},
      {absl::StrCat(R"({"custom_id":"a","url":"/v1/completions",)", body, "}"),
       R"~(invalid_value method: method must be "POST", found none)~"},
      {absl::StrCat(R"({"custom_id":"a","method":"GET","url":"/v1/completions",)", body, "}"),
       R"~(invalid_value method: method must be "POST", found "GET")~"},
      {absl::StrCat(R"({"custom_id":"a","method":"POST","url":"/v1/embeddings",)", body, "}"),
       R"~(invalid_value url: url must be "/v1/chat/completions" or "/v1/completions", found "/v1/embeddings")~"},
      {absl::StrCat(R"({"custom_id":"a","method":"POST","url":null,)", body, "}"),
       R"~(invalid_value url: url must be "/v1/chat/completions" or "/v1/completions", found null)~"},
      {R"({"custom_id":"a","method":"POST","url":"/v1/completions"})",
       "invalid_value body: body must be an object, found none"},
      {line_with("/v1/completions", "[]"), "invalid_value body: body must be an object, found a list"},
      {line_with("/v1/completions", "{}"), "invalid_value prompt: prompt is missing"},
      {line_with("/v1/chat/completions", "{}"), "invalid_value messages: messages is missing"},
  };
  for (const auto& [line, error] : cases) EXPECT_EQ(error_of(line), error) << line;
}

TEST(BatchLine, RefusesBodiesNamingTheField) {
  const std::vector<std::pair<std::string, std::string>> completions = {
      {R"("prompt":"x","model":"gpt-4")",
       R"~(model_not_found -: model "gpt-4" is not here: this is "fake" (or leave the field out))~"},
      {R"("prompt":"x","model":4)", "invalid_value model: model must be a text, found 4"},
      {R"("prompt":[])", "invalid_value prompt: prompt must not be empty"},
      {R"("prompt":"")", "invalid_value prompt: prompt must be at least one character, found none"},
      {R"("prompt":5)",
       "invalid_value prompt: prompt must be a text, a list of token ids, or a list of those, found 5"},
      {R"("prompt":["a",5])", "invalid_value prompt[1]: prompt[1] must be a text or a list of token ids, found 5"},
      {R"("prompt":["a",""])", "invalid_value prompt[1]: prompt[1] must be at least one character, found none"},
      {R"("prompt":[1,"a"])", "invalid_value prompt[0]: prompt[0] must be a text or a list of token ids, found 1"},
      {R"("prompt":[1,-5,9000])",
       "invalid_value prompt[1]: prompt[1] must be a token id of this model, 0 to 264, found -5; prompt[2] must be a "
       "token id of this model, 0 to 264, found 9000"},
      {R"("prompt":[[1],[2,9000]])",
       "invalid_value prompt[1][1]: prompt[1][1] must be a token id of this model, 0 to 264, found 9000"},
      {R"("prompt":[[1],[]])", "invalid_value prompt[1]: prompt[1] must be at least one token id, found none"},
      {R"("prompt":[1.5])", "invalid_value prompt[0]: prompt[0] must be a text or a list of token ids, found 1.5"},
      {R"("prompt":"x","n":0)", "invalid_value n: n must be 1 to 64, found 0"},
      {R"("prompt":"x","n":"2")", R"~(invalid_value n: n must be a whole number of 32 bits, found "2")~"},
      {R"("prompt":"x","n":1e10)", "invalid_value n: n must be a whole number of 32 bits, found 10000000000.0"},
      {R"("prompt":"x","n":2,"best_of":3)",
       "invalid_value best_of: best_of must be absent or n, 2: every output is given, none is chosen"},
      {R"("prompt":"x","suffix":"end")",
       R"~(invalid_value suffix: suffix must be absent or "": text is only ever continued)~"},
      {R"("prompt":"x","echo":1)", "invalid_value echo: echo must be true or false, found 1"},
      {R"("prompt":"x","echo":true,"logprobs":99)", "invalid_value logprobs: logprobs must be 0 to 20, found 99"},
      {R"("prompt":"x","logprobs":true)",
       "invalid_value logprobs: logprobs must be a whole number of 32 bits, found true"},
      {R"("prompt":"x","temperature":-1,"top_p":2,"max_tokens":0)",
       "invalid_value temperature: temperature must be 0 (greedy) or a positive number, found -1; top_p must be above "
       "0 and at most 1 (off), found 2; max_tokens must be 1 to 4096, the context (leave it out for all that fits), "
       "found 0"},
      {R"("prompt":"x","temperature":1e300)", "invalid_value temperature: temperature must be a number, found 1e+300"},
      {R"("prompt":"x","seed":1.5)", "invalid_value seed: seed must be a whole number of 64 bits, found 1.5"},
      {R"("prompt":"x","seed":1e30)", "invalid_value seed: seed must be a whole number of 64 bits, found 1e+30"},
      {R"("prompt":"x","stop":[1])", "invalid_value stop[0]: stop[0] must be a text, found 1"},
      {R"("prompt":"x","stop":{"a":1})", "invalid_value stop: stop must be a list, found an object"},
      {R"("prompt":"x","stop":[""])", "invalid_value stop[0]: stop[0] must be 1 to 1024 bytes long, found 0"},
      {R"("prompt":"x","logit_bias":[1])", "invalid_value logit_bias: logit_bias must be an object, found a list"},
      {R"("prompt":"x","logit_bias":{"one":1})",
       R"~(invalid_value logit_bias: logit_bias must have token ids as its keys, found "one")~"},
      {R"("prompt":"x","logit_bias":{"1":"a"})",
       R"~(invalid_value logit_bias.1: logit_bias.1 must be a number, found "a")~"},
      {R"("prompt":"x","logit_bias":{"1":101})",
       "invalid_value logit_bias[1]: logit_bias[1] must be from -100 to 100, found 101"},
      {R"("prompt":"x","stop_token_ids":[1,"2"])",
       R"~(invalid_value stop_token_ids[1]: stop_token_ids[1] must be a whole number of 32 bits, found "2")~"},
      {R"("prompt":"x","stream":true)", "invalid_value stream: stream must be absent or false: a batch has no streams"},
      {R"("prompt":"x","guided_json":{})",
       "invalid_value guided_json: guided_json must be absent: constrained output does not exist yet"},
      {R"("prompt":"x","min_tokens":5,"max_tokens":4)",
       "invalid_value min_tokens: min_tokens must be 0 to 4, the most tokens there may be, found 5"},
  };
  for (const auto& [fields, error] : completions) {
    EXPECT_EQ(error_of(line_with("/v1/completions", absl::StrCat("{", fields, "}"))), error) << fields;
  }
}

TEST(BatchLine, RefusesChatsNamingTheField) {
  const std::string user = R"("messages":[{"role":"user","content":"Hi"}])";
  const std::vector<std::pair<std::string, std::string>> chats = {
      {R"("messages":[])", "invalid_value messages: messages must be at least one message, found none"},
      {R"("messages":"Hi")", R"~(invalid_value messages: messages must be a list, found "Hi")~"},
      {R"("messages":["Hi"])", R"~(invalid_value messages[0]: messages[0] must be an object, found "Hi")~"},
      {R"("messages":[{"content":"Hi"}])", "invalid_value messages[0].role: messages[0].role is missing"},
      {R"("messages":[{"role":"critic","content":"Hi"}])",
       "invalid_value -: message 0 has role 'critic'; this model's chat format knows system, user, assistant, tool and "
       "ipython"},
      {R"("messages":[{"role":"user"}])", "invalid_value -: message 0 has no content"},
      {R"("messages":[{"role":"user","content":5}])",
       "invalid_value messages[0].content: messages[0].content must be a text or a list of parts, found 5"},
      {R"("messages":[{"role":"user","content":[{"type":"image_url","image_url":{}}]}])",
       R"~(invalid_value messages[0].content[0].type: messages[0].content[0].type must be "text", found "image_url")~"},
      {R"("messages":[{"role":"user","content":[{"type":"text"}]}])",
       "invalid_value messages[0].content[0].text: messages[0].content[0].text is missing"},
      {R"("messages":[{"role":"assistant","tool_calls":[{"type":"function"}]}])",
       "invalid_value messages[0].tool_calls[0].function: messages[0].tool_calls[0].function is missing"},
      {R"("messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":{}}}]}])",
       "invalid_value messages[0].tool_calls[0].function.arguments: messages[0].tool_calls[0].function.arguments must "
       "be a text, found an object"},
      {R"("messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"[]"}}]}])",
       "invalid_value -: message 0, arguments of tool call 'f': a JSON object is needed"},
      {user + R"(,"tools":[{"type":"retrieval"}])",
       R"~(invalid_value tools[0].type: tools[0].type must be "function", found "retrieval")~"},
      {user + R"(,"tools":[{"type":"function"}])", "invalid_value tools[0].function: tools[0].function is missing"},
      {user + R"(,"tools":{})", "invalid_value tools: tools must be a list, found an object"},
      {user + R"(,"tool_choice":"required")",
       R"~(invalid_value tool_choice: tool_choice must be "auto" or "none": constrained output does not exist yet)~"},
      {user + R"(,"tool_choice":{"type":"function","function":{"name":"f"}})",
       R"~(invalid_value tool_choice: tool_choice must be "auto" or "none": constrained output does not exist yet)~"},
      {user + R"(,"response_format":{"type":"json_object"})",
       R"~(invalid_value response_format: response_format must be absent or {"type":"text"}: constrained output does not exist yet)~"},
      {user + R"(,"top_logprobs":2)", "invalid_value top_logprobs: top_logprobs needs logprobs to be true"},
      {user + R"(,"logprobs":true,"top_logprobs":21)",
       "invalid_value top_logprobs: top_logprobs must be 0 to 20, found 21"},
      {user + R"(,"logprobs":1)", "invalid_value logprobs: logprobs must be true or false, found 1"},
      {user + R"(,"add_generation_prompt":false)",
       "invalid_value add_generation_prompt: add_generation_prompt must be absent or true: an answer is the "
       "assistant's next turn"},
      {user + R"(,"chat_template":"x")",
       "invalid_value chat_template: chat_template must be absent: a chat is rendered in the model's own format"},
      {user + R"(,"modalities":["audio"])",
       R"~(invalid_value modalities: modalities must be absent or ["text"]: text is all that the model reads and writes)~"},
      {user + R"(,"max_completion_tokens":5000)",
       "invalid_value max_tokens: max_tokens must be 1 to 4096, the context (leave it out for all that fits), found "
       "5000"},
  };
  for (const auto& [fields, error] : chats) {
    EXPECT_EQ(error_of(line_with("/v1/chat/completions", absl::StrCat("{", fields, "}"))), error) << fields;
  }
}

TEST(BatchLine, RefusesChatsThatTheModelHasNoFormatFor) {
  const ServedModel chatml = fake_model();
  EXPECT_EQ(error_of(chat_line(R"("tools":[{"type":"function","function":{"name":"f"}}])"), 3, chatml),
            "invalid_value -: this model's chat format has no place for tools");
  ServedModel plain = fake_model();
  plain.chat = absl::FailedPreconditionError("no chat format");
  EXPECT_EQ(error_of(chat_line(""), 3, plain), "unsupported_value -: no chat format");
}

TEST(BatchLine, TakesCarriageReturnsAndAByteOrderMark) {
  const std::string text = completion_line(R"("prompt":"x")");
  EXPECT_FALSE(read(text + "\r").failed());
  EXPECT_FALSE(read("\xEF\xBB\xBF" + text + "\r", 1).failed());
}

TEST(BatchLine, TakesAsManyBytesAsItSays) {
  std::string text = completion_line(R"("prompt":"x","user":"")");
  text.insert(text.size() - 3, std::string(kMaxBatchLineBytes - text.size(), 'u'));
  EXPECT_EQ(error_of(text), "none");
  text.insert(text.size() - 3, "u");
  EXPECT_EQ(error_of(text), "invalid_json_line -: line 3 has more than 16 MiB: split it");
}

TEST(BatchLine, ReadsObjectsOfManyMembersInNoTime) {
  std::string members;
  for (int i = 0; i < 300'000; ++i) absl::StrAppend(&members, ",\"m", i, "\":0");
  EXPECT_EQ(error_of(completion_line(absl::StrCat(R"("prompt":"x")", members))), "none");
}

// Whatever is in a line, it is answered with a line.
TEST(BatchLine, AnswersAnyBytes) {
  const std::string seeds[] = {
      chat_line(R"("tools":[{"type":"function","function":{"name":"f"}}],"logit_bias":{"97":1},"stop":["a"])"),
      completion_line(R"("prompt":[[97,98],[99]],"echo":true,"logprobs":1,"seed":-3,"n":2)"),
      line_with(
          "/v1/chat/completions",
          R"({"messages":[{"role":"user","content":[{"type":"text","text":"é"}]},{"role":"assistant",)"
          R"("tool_calls":[{"function":{"name":"f","arguments":"{\"a\":1}"}}]},{"role":"tool","content":"x"}]})")};
  const std::string letters = "{}[]\"\\:,0129.-+eEntrufalse \xff";
  std::mt19937 random(1);
  int run_lines = 0;
  for (int i = 0; i < 5000; ++i) {
    std::string text = seeds[random() % std::size(seeds)];
    for (uint32_t edits = random() % 4; edits > 0; --edits) {
      const size_t at = random() % text.size();
      const std::string_view token =
          std::vector<std::string_view>{"null", "{}", "[]", "1e999", "-7", "\"\""}[random() % 6];
      if (random() % 2 == 0) {
        text[at] = letters[random() % letters.size()];
      } else if (random() % 2 == 0) {
        text.insert(at, token);
      } else {
        text.erase(at, 1 + random() % 8);
      }
    }
    BatchLine line = read(text, 1 + i);
    run_lines += !line.failed();
    run(&line, says("x"));
    const Json answer = Json::parse(line.answer(), nullptr, /*allow_exceptions=*/false);
    ASSERT_TRUE(answer.is_object()) << text;
    ASSERT_EQ(answer["response"]["status_code"] == 200, !line.failed()) << text;
  }
  EXPECT_GT(run_lines, 1000);
}

}  // namespace
}  // namespace octet
