// The life of a request over gRPC: several outputs, chats answered at once, logprobs of the prompt, echo, deadlines,
// queues that are full, and what the operator may do about it.
#include <google/protobuf/util/message_differencer.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "coordinator/generate_output.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "tests/service_house.h"
#include "tests/toy_chat.h"

namespace octet {
namespace {

using namespace std::chrono_literals;

template <typename Details>
std::optional<Details> details_of(const grpc::Status& status) {
  google::rpc::Status all;
  if (!all.ParseFromString(status.error_details())) return std::nullopt;
  for (const auto& any : all.details()) {
    Details details;
    if (any.UnpackTo(&details)) return details;
  }
  return std::nullopt;
}

// What a client heard of one output.
struct HeardOutput {
  std::string text;
  std::vector<int32_t> ids;
  int ends = 0;
  v1::GenerateResponse last;
};

std::map<uint32_t, HeardOutput> by_output(const Heard& heard) {
  std::map<uint32_t, HeardOutput> outputs;
  for (const v1::GenerateResponse& message : heard.messages) {
    HeardOutput& output = outputs[message.output_index()];
    EXPECT_EQ(output.ends, 0) << "a message came after the end of its output";
    output.text += message.text();
    for (const auto& token : message.tokens()) output.ids.push_back(token.token_id());
    output.ends += message.finish_reason() != v1::FINISH_REASON_UNSPECIFIED;
    output.last = message;
  }
  return outputs;
}

// ---- Several outputs

TEST(Outputs, EachHasItsIndexAndItsEndAndTheLastMessageHasTheUsage) {
  Service service({}, "hello, world");
  v1::GenerateRequest request = prompt("hi");
  request.mutable_sampling()->set_n(5);
  const Heard heard = service.generate(request);
  ASSERT_TRUE(heard.status.ok()) << heard.status.error_message();
  const auto outputs = by_output(heard);
  ASSERT_EQ(outputs.size(), 5u);
  int tokens = 0, usages = 0, prompts = 0;
  for (const auto& [index, output] : outputs) {
    EXPECT_EQ(output.text, "hello, world") << index;
    EXPECT_EQ(output.ends, 1);
    EXPECT_EQ(output.last.finish_reason(), v1::FINISH_REASON_STOP);
    tokens += static_cast<int>(output.ids.size());
  }
  for (const auto& message : heard.messages) {
    usages += message.has_usage();
    prompts += !message.prompt_token_ids().empty();
  }
  EXPECT_EQ(prompts, 1);
  EXPECT_EQ(usages, 1);
  EXPECT_EQ(heard.last().usage().completion_tokens(), tokens);
  EXPECT_EQ(heard.last().usage().prompt_tokens(), heard.messages[0].prompt_token_ids_size());
  service.expect_quiet();
}

TEST(Outputs, EachStopsAtItsOwnStopString) {
  Service service({}, "one two three four five six seven");
  v1::GenerateRequest request = prompt("hi");
  request.mutable_sampling()->set_n(3);
  request.mutable_stopping()->add_stop("four");
  const auto outputs = by_output(service.generate(request));
  ASSERT_EQ(outputs.size(), 3u);
  for (const auto& [index, output] : outputs) {
    EXPECT_EQ(output.text, "one two three ");
    EXPECT_EQ(output.last.stop_string(), "four");
  }
  service.expect_quiet();
}

// One output ends at a stop string while its sibling goes on: driven by hand, for a fake model says the same in all.
TEST(Outputs, OneThatStopsIsToldApartFromOnesThatGoOn) {
  const Tokenizer tokenizer = fake_tokenizer();
  AcceptedRequest accepted;
  accepted.request.prompt = {5};
  accepted.request.outputs = 2;
  accepted.stop = {"b"};
  GenerateOutputs outputs(accepted, tokenizer);
  const auto token = [&](uint32_t index, char letter) {
    return TokenEvent{.output_index = index, .token = TokenLogprob{.token = 3 + letter}};
  };
  EXPECT_FALSE(outputs.absorb(token(0, 'a')));
  EXPECT_TRUE(outputs.absorb(token(1, 'b'))) << "the engine has to be told";
  EXPECT_FALSE(outputs.absorb(token(1, 'x'))) << "and until it knows, nothing comes of what it sends";
  EXPECT_FALSE(outputs.ended());
  TokenEvent end = token(0, 'c');
  end.finish = FinishReason::kLength;
  EXPECT_FALSE(outputs.absorb(end));
  EXPECT_TRUE(outputs.ended());
  v1::GenerateResponse first, second, none;
  ASSERT_TRUE(outputs.take(&first));
  ASSERT_TRUE(outputs.take(&second));
  EXPECT_FALSE(outputs.take(&none));
  EXPECT_EQ(first.text(), "ac") << "what waited has become one message";
  EXPECT_FALSE(first.has_usage());
  EXPECT_EQ(second.text(), "");
  EXPECT_EQ(second.stop_string(), "b");
  EXPECT_EQ(second.usage().completion_tokens(), 3);
  EXPECT_EQ(outputs.unread_tokens(), 0);
}

// ---- Chat

TEST(Chat, AnswersAllAtOnce) {
  Service service({}, "Paris");
  v1::ChatRequest request;
  v1::ChatMessage* message = request.mutable_chat()->add_messages();
  message->set_role("user");
  message->set_content("Capital of France?");
  request.mutable_sampling()->set_n(2);
  request.set_logprobs(1);
  grpc::ClientContext context;
  v1::ChatResponse response;
  const grpc::Status status = service.inference->Chat(&context, request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.outputs_size(), 2);
  int tokens = 0;
  for (const v1::ChatOutput& output : response.outputs()) {
    EXPECT_EQ(output.message().role(), "assistant");
    EXPECT_EQ(output.message().content(), "Paris");
    EXPECT_EQ(output.finish_reason(), v1::FINISH_REASON_STOP);
    EXPECT_EQ(output.stop_token_id(), kFakeImEnd);
    EXPECT_EQ(output.tokens(0).top_size(), 1);
    tokens += output.tokens_size();
  }
  EXPECT_EQ(response.usage().completion_tokens(), tokens);
  service.expect_quiet();
}

TEST(Chat, ToldOfToolsFindsTheCallsThatAnAnswerIsMadeOf) {
  const Tokenizer tokenizer = toy(kToyLlama31);
  Service service({}, "", fake_model(tokenizer));
  const auto answer = [&](const std::string& text, bool python_tag, bool tools) {
    std::vector<int32_t> script = tokenizer.encode(text, false);
    if (python_tag) script.insert(script.begin(), *tokenizer.special_id("<|python_tag|>"));
    script.push_back(*tokenizer.special_id("<|eot_id|>"));
    service.group.set_script(script);
    v1::ChatRequest request;
    request.mutable_chat()->add_messages()->set_role("user");
    request.mutable_chat()->mutable_messages(0)->set_content("Weather?");
    if (tools) request.mutable_chat()->add_tools_json(R"({"name":"weather"})");
    grpc::ClientContext context;
    v1::ChatResponse response;
    const grpc::Status status = service.inference->Chat(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(response.outputs(0).finish_reason(), v1::FINISH_REASON_STOP);
    return response.outputs(0).message();
  };
  const std::string call = R"({"name": "weather", "parameters": {"city": "Bonn"}})";
  const v1::ChatMessage called = answer(call, false, true);
  EXPECT_FALSE(called.has_content());
  ASSERT_EQ(called.tool_calls_size(), 1);
  EXPECT_EQ(called.tool_calls(0).name(), "weather");
  EXPECT_EQ(called.tool_calls(0).arguments_json(), R"({"city":"Bonn"})");

  const v1::ChatMessage coded = answer("print(1)", true, true);
  ASSERT_EQ(coded.tool_calls_size(), 1);
  EXPECT_EQ(coded.tool_calls(0).name(), "code_interpreter");

  for (const v1::ChatMessage& said : {answer(call, false, false), answer("{it rains}", false, true)}) {
    EXPECT_TRUE(said.has_content());
    EXPECT_EQ(said.tool_calls_size(), 0);
  }
}

TEST(Chat, RefusesAsGenerateDoesAndCancels) {
  Service service({}, "Paris");
  v1::ChatResponse response;
  {
    grpc::ClientContext context;
    v1::ChatRequest request;
    request.mutable_chat();
    EXPECT_EQ(service.inference->Chat(&context, request, &response).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  }
  service.group.set_step_time(1ms);
  v1::ChatRequest endless;
  endless.mutable_chat()->add_messages()->set_role("user");
  endless.mutable_chat()->mutable_messages(0)->set_content("Tell me everything");
  endless.mutable_stopping()->set_ignore_eos(true);
  grpc::ClientContext context;
  std::thread canceller([&] {
    while (service.engine->stats().running == 0) std::this_thread::sleep_for(1ms);
    context.TryCancel();
  });
  EXPECT_EQ(service.inference->Chat(&context, endless, &response).error_code(), grpc::StatusCode::CANCELLED);
  canceller.join();
  service.expect_quiet();
}

// ---- What comes with the text

TEST(PromptLogprobs, ComeBeforeTheFirstTokenAndTheFirstPromptTokenHasNone) {
  Service service({}, "ok");
  v1::GenerateRequest request = prompt("a long enough prompt to be scored");
  request.set_prompt_logprobs(2);
  const Heard heard = service.generate(request);
  expect_well_formed(heard);
  std::vector<int32_t> ids;
  bool text_began = false;
  for (const auto& message : heard.messages) {
    for (const auto& token : message.prompt_tokens()) {
      EXPECT_FALSE(text_began);
      EXPECT_EQ(token.has_logprob(), !ids.empty());
      EXPECT_EQ(token.top_size(), ids.empty() ? 0 : 2);
      ids.push_back(token.token_id());
    }
    text_began |= message.tokens_size() > 0;
  }
  const auto& prompt_ids = heard.messages[0].prompt_token_ids();
  EXPECT_EQ(ids, std::vector<int32_t>(prompt_ids.begin(), prompt_ids.end()));
}

TEST(PromptLogprobs, OfAPromptOfOneTokenAreThatTokenAlone) {
  Service service({}, "ok");
  v1::GenerateRequest request;
  request.mutable_token_ids()->add_ids(70);
  request.set_prompt_logprobs(0);
  const Heard heard = service.generate(request);
  expect_well_formed(heard);
  ASSERT_EQ(heard.messages[0].prompt_tokens_size(), 1);
  EXPECT_FALSE(heard.messages[0].prompt_tokens(0).has_logprob());
}

TEST(Echo, PutsThePromptBeforeEveryOutput) {
  Service service({}, ", world");
  v1::GenerateRequest request = prompt("hello");
  request.set_echo(true);
  request.mutable_sampling()->set_n(2);
  for (const auto& [index, output] : by_output(service.generate(request))) EXPECT_EQ(output.text, "hello, world");
  v1::GenerateRequest ids;
  for (const char letter : std::string("abc")) ids.mutable_token_ids()->add_ids(3 + letter);
  ids.set_echo(true);
  EXPECT_EQ(service.generate(ids).text(), "abc, world");
}

TEST(IncludeStop, KeepsTheTextOfAStopTokenToo) {
  Service service({}, "abcdef");
  v1::GenerateRequest request = prompt("x");
  request.mutable_stopping()->add_stop_token_ids(3 + 'd');
  EXPECT_EQ(service.generate(request).text(), "abc");
  request.mutable_stopping()->set_include_stop(true);
  const Heard heard = service.generate(request);
  EXPECT_EQ(heard.text(), "abcd");
  EXPECT_EQ(heard.last().stop_token_id(), 3 + 'd');
}

TEST(Usage, CountsWhatTheCacheHad) {
  Service service({}, "ok");
  const std::string text(100, 'x');
  EXPECT_EQ(service.generate(prompt(text)).last().usage().cached_tokens(), 0);
  const Heard again = service.generate(prompt(text));
  EXPECT_GT(again.last().usage().cached_tokens(), 64);
  v1::GenerateRequest salted = prompt(text);
  salted.set_cache_salt("somebody else");
  EXPECT_EQ(service.generate(salted).last().usage().cached_tokens(), 0);
  v1::GetLoadResponse load;
  grpc::ClientContext context;
  ASSERT_TRUE(service.control->GetLoad(&context, {}, &load).ok());
  EXPECT_EQ(load.cached_prompt_tokens(), static_cast<uint64_t>(again.last().usage().cached_tokens()));
  EXPECT_GT(load.kv_blocks_cached(), 0);
  EXPECT_GT(load.resident_bytes(), 0);
}

// ---- Names

TEST(RequestId, IsTheClientsOrOneThatTheServerGives) {
  Service service;
  const auto id_of = [&service](const std::string& field, const std::string& metadata) {
    v1::GenerateRequest request = prompt("hi");
    if (!field.empty()) request.set_request_id(field);
    grpc::ClientContext context;
    if (!metadata.empty()) context.AddMetadata("x-request-id", metadata);
    EXPECT_TRUE(service.generate(request, &context).status.ok());
    const auto found = context.GetServerInitialMetadata().find("x-request-id");
    if (found == context.GetServerInitialMetadata().end()) return std::string();
    return std::string(found->second.data(), found->second.size());
  };
  EXPECT_EQ(id_of("mine", ""), "mine");
  EXPECT_EQ(id_of("", "theirs"), "theirs");
  EXPECT_EQ(id_of("mine", "theirs"), "mine");
  const std::string given = id_of("", ""), other = id_of("", "");
  EXPECT_EQ(given.size(), 32u);
  EXPECT_NE(given, other);
}

TEST(TraceParent, IsEchoedIfItIsOne) {
  Service service;
  const auto echo_of = [&service](const std::string& traceparent) {
    grpc::ClientContext context;
    context.AddMetadata("traceparent", traceparent);
    service.generate(prompt("hi"), &context);
    const auto found = context.GetServerInitialMetadata().find("traceparent");
    if (found == context.GetServerInitialMetadata().end()) return std::string();
    return std::string(found->second.data(), found->second.size());
  };
  const std::string good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
  EXPECT_EQ(echo_of(good), good);
  for (const std::string bad : {"", "00", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0",
                                "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
                                "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
                                "00_4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7_01",
                                "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                                "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
                                "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01"}) {
    EXPECT_EQ(echo_of(bad), "") << bad;
  }
}

TEST(Priority, MayComeAsMetadata) {
  Service service;
  for (const std::string good : {"0", "9"}) {
    grpc::ClientContext context;
    context.AddMetadata("octet-priority", good);
    expect_well_formed(service.generate(prompt("hi"), &context));
  }
  for (const std::string bad : {"-1", "10", "high", "1e1"}) {
    grpc::ClientContext context;
    context.AddMetadata("octet-priority", bad);
    const Heard heard = service.generate(prompt("hi"), &context);
    EXPECT_EQ(heard.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << bad;
    EXPECT_TRUE(absl::StrContains(heard.status.error_message(), "octet-priority"));
  }
}

// ---- Ends that are not the model's

// A request that runs until somebody ends it.
v1::GenerateRequest endless(const std::string& id = "") {
  v1::GenerateRequest request = prompt("on and on");
  request.mutable_stopping()->set_ignore_eos(true);
  if (!id.empty()) request.set_request_id(id);
  return request;
}

TEST(Abort, EndsTheRequestsThatItNamesAndMayBeRepeated) {
  Service service;
  service.group.set_step_time(1ms);
  std::atomic<int> aborted = 0;
  std::vector<std::thread> clients;
  for (const std::string id : {"a", "b", "b"}) {
    clients.emplace_back([&service, &aborted, id] {
      const Heard heard = service.generate(endless(id));
      aborted += heard.status.error_code() == grpc::StatusCode::ABORTED;
      EXPECT_TRUE(absl::StrContains(heard.status.error_message(), "aborted")) << heard.status.error_message();
    });
  }
  while (service.engine->stats().running < 3) std::this_thread::sleep_for(1ms);
  int told = 0;
  for (int i = 0; i < 2; ++i) {
    v1::AbortRequest request;
    for (const char* id : {"a", "b", "nobody"}) request.add_request_ids(id);
    v1::AbortResponse response;
    grpc::ClientContext context;
    ASSERT_TRUE(service.control->Abort(&context, request, &response).ok());
    told = std::max(told, response.aborted());
    if (i == 0) {
      for (std::thread& client : clients) client.join();
    }
  }
  EXPECT_EQ(aborted, 3);
  EXPECT_EQ(told, 3);
  service.expect_quiet();
}

TEST(Drain, TellsWhoeverRunsTheServer) {
  std::atomic<int> drains = 0;
  Service service({.on_drain = [&drains] { ++drains; }});
  grpc::ClientContext context;
  v1::DrainResponse response;
  EXPECT_TRUE(service.control->Drain(&context, {}, &response).ok());
  EXPECT_EQ(drains, 1);
}

TEST(Deadline, FreesTheRequestWhoseTimeIsUpAlsoInTheQueue) {
  Service service;
  service.group.set_step_time(5ms);
  std::vector<std::thread> clients;
  std::atomic<int> late = 0;
  for (int i = 0; i < 80; ++i) {  // more than there are slots
    clients.emplace_back([&service, &late] {
      grpc::ClientContext context;
      context.set_deadline(std::chrono::system_clock::now() + 300ms);
      late += service.generate(endless(), &context).status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED;
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(late, 80);
  service.expect_quiet();
}

TEST(Queue, RefusesWhatItCannotHoldWithAHintWhenToTryAgain) {
  Service service;
  service.group.set_step_time(2ms);
  v1::GenerateRequest many = endless();
  many.mutable_sampling()->set_n(64);
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>>> readers;
  const auto outputs = [&service] { return service.engine->stats().waiting + service.engine->stats().running; };
  while (outputs() < 1024 + 64) {
    const int before = outputs();
    contexts.push_back(std::make_unique<grpc::ClientContext>());
    readers.push_back(service.inference->Generate(contexts.back().get(), many));
    while (outputs() == before) std::this_thread::sleep_for(1ms);
  }
  const grpc::Status refused = service.generate(many).status;
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << refused.error_message();
  EXPECT_EQ(details_of<google::rpc::ErrorInfo>(refused)->reason(), "QUEUE_FULL");
  const auto hint = details_of<google::rpc::RetryInfo>(refused);
  ASSERT_TRUE(hint.has_value());
  EXPECT_GT(hint->retry_delay().seconds() * 1e9 + hint->retry_delay().nanos(), 0);
  for (const auto& context : contexts) context->TryCancel();
  for (const auto& reader : readers) reader->Finish();
  service.expect_quiet();
}

TEST(Errors, AreCutBetweenCharacters) {
  Service service;
  v1::GenerateRequest request;
  std::string role;
  for (int i = 0; i < 3000; ++i) role += "\u8af8";
  request.mutable_chat()->add_messages()->set_role(role);
  const Heard heard = service.generate(request);
  EXPECT_EQ(heard.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_TRUE(is_valid_utf8(heard.status.error_message()));
}

TEST(Errors, SayWhyForProgramsToo) {
  Service service;
  const Heard heard = service.generate(prompt(""));
  const auto info = details_of<google::rpc::ErrorInfo>(heard.status);
  ASSERT_TRUE(info.has_value());
  EXPECT_EQ(info->domain(), "octet");
  EXPECT_EQ(info->reason(), "INVALID_ARGUMENT");
}

// ---- Clients that do not read

TEST(Stall, EndsAClientThatStopsReadingAlthoughNothingNewComesForIt) {
  Service service({.streams = {.stall = absl::Milliseconds(200)}});
  v1::GenerateRequest request = endless();
  request.mutable_stopping()->set_max_tokens(3000);
  request.mutable_sampling()->set_n(16);
  request.set_logprobs(20);  // much more than what flow control lets pass
  grpc::ClientContext context;
  auto reader = service.inference->Generate(&context, request);
  v1::GenerateResponse message;
  ASSERT_TRUE(reader->Read(&message));
  EXPECT_TRUE(service.wait_quiet()) << "the engine finishes, or is told to stop";
  const auto calls_left = [&service] {
    v1::GetLoadResponse load;
    grpc::ClientContext own;
    service.control->GetLoad(&own, {}, &load);
    return load.requests_running() + load.requests_waiting();
  };
  EXPECT_EQ(calls_left(), 0);
  std::this_thread::sleep_for(2s);  // nothing is read, nothing comes: only the watcher can end it
  while (reader->Read(&message)) {
  }
  EXPECT_FALSE(reader->Finish().ok());
}

}  // namespace
}  // namespace octet
