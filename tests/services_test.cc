// The public services over a real port: a real engine, a fake worker group, a small tokenizer, and clients of every
// kind of manners.
#include <arpa/inet.h>
#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "coordinator/generate_request.h"
#include "coordinator/server.h"
#include "coordinator/text/utf8.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "octet/v1/control_service.grpc.pb.h"
#include "octet/v1/inference_service.grpc.pb.h"
#include "tests/service_house.h"

namespace octet {
namespace {

using std::chrono::milliseconds;

// ---------------------------------------------------------------------------------------------------------- Generate

TEST(Generate, StreamsAPromptToItsEnd) {
  Service service;
  Heard heard = service.generate(prompt("say hello"));
  expect_well_formed(heard);
  EXPECT_EQ(heard.text(), "hello, world");
  EXPECT_EQ(heard.token_ids(), service.script("hello, world"));  // the end token is a token, but no text
  EXPECT_EQ(heard.last().finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(heard.last().stop_token_id(), kFakeImEnd);
  const std::vector<int32_t> ids = service.tokenizer.encode("say hello", true);
  EXPECT_EQ(
      std::vector<int32_t>(heard.messages[0].prompt_token_ids().begin(), heard.messages[0].prompt_token_ids().end()),
      ids);
  EXPECT_EQ(heard.last().usage().prompt_tokens(), static_cast<int32_t>(ids.size()));
  for (const auto& message : heard.messages) {
    for (const auto& token : message.tokens()) EXPECT_FALSE(token.has_logprob());
  }
  service.expect_quiet();
}

TEST(Generate, SendsTokensAsTheyComeWhenStepsAreSlow) {
  Service service;
  service.group.set_step_time(milliseconds(20));
  Heard heard = service.generate(prompt("x"));
  expect_well_formed(heard);
  EXPECT_GT(heard.messages.size(), heard.token_ids().size() / 2);
}

TEST(Generate, StopsAtMaxTokensAndGivesLogprobsWhenAsked) {
  Service service;
  v1::GenerateRequest request = prompt("x");
  request.mutable_stopping()->set_max_tokens(3);
  request.set_logprobs(2);
  Heard heard = service.generate(request);
  expect_well_formed(heard);
  EXPECT_EQ(heard.last().finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(heard.last().stop_match_case(), v1::GenerateResponse::STOP_MATCH_NOT_SET);
  ASSERT_EQ(heard.token_ids().size(), 3u);
  float expected = 0;
  for (const auto& message : heard.messages) {
    for (const auto& token : message.tokens()) {
      EXPECT_EQ(token.logprob(), expected);
      EXPECT_EQ(token.top_size(), 2);
      expected -= 0.125f;
    }
  }
}

TEST(Generate, RendersAChatInTheModelsFormat) {
  Service service;
  v1::GenerateRequest request;
  v1::ChatMessage* message = request.mutable_chat()->add_messages();
  message->set_role("system");
  message->set_content("be brief");
  message = request.mutable_chat()->add_messages();
  message->set_role("user");
  message->set_content("hi <|im_end|>");  // plain text: it ends no turn
  Heard heard = service.generate(request);
  expect_well_formed(heard);
  const auto& ids = heard.messages[0].prompt_token_ids();
  EXPECT_EQ(std::count(ids.begin(), ids.end(), kFakeImStart), 3);
  EXPECT_EQ(std::count(ids.begin(), ids.end(), kFakeImEnd), 2);
  EXPECT_EQ(
      service.tokenizer.decode({ids.data(), static_cast<size_t>(ids.size())}, false),
      "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi <|im_end|><|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(heard.last().stop_token_id(), kFakeImEnd);
}

TEST(Generate, TakesTokenIdsAsTheyAre) {
  Service service;
  v1::GenerateRequest request;
  for (int32_t id : {7, 1, 262}) request.mutable_token_ids()->add_ids(id);
  Heard heard = service.generate(request);
  expect_well_formed(heard);
  const auto& ids = heard.messages[0].prompt_token_ids();
  EXPECT_EQ(std::vector<int32_t>(ids.begin(), ids.end()), (std::vector<int32_t>{7, 1, 262}));
}

TEST(Generate, FindsStopStringsAcrossTokensAndCancelsTheRest) {
  Service service({}, "shells hold hello");
  for (const bool include : {false, true}) {
    // Tokens are "s" "hell" "s" " " "h" "o" ...: the stop string begins inside one and ends inside another.
    v1::GenerateRequest request = prompt("x");
    request.mutable_stopping()->add_stop("zebra");
    request.mutable_stopping()->add_stop("ls ho");
    request.mutable_stopping()->set_include_stop(include);
    request.mutable_stopping()->set_ignore_eos(true);  // would go on for the whole context
    Heard heard = service.generate(request);
    expect_well_formed(heard);
    EXPECT_EQ(heard.text(), include ? "shells ho" : "shel");
    EXPECT_EQ(heard.last().finish_reason(), v1::FINISH_REASON_STOP);
    EXPECT_EQ(heard.last().stop_string(), "ls ho");
    EXPECT_EQ(heard.token_ids().size(), 6u);
    service.expect_quiet();
  }
}

TEST(Generate, HoldsBackTextThatMayBecomeAStopStringAndReleasesItAtTheEnd) {
  Service service({}, "hello");
  v1::GenerateRequest request = prompt("x");
  request.mutable_stopping()->add_stop("hello!");
  Heard heard = service.generate(request);
  expect_well_formed(heard);
  EXPECT_EQ(heard.text(), "hello");
  EXPECT_EQ(heard.last().stop_token_id(), kFakeImEnd);
}

TEST(Generate, NeverSplitsACharacterThatSpansTokens) {
  const std::string text = "h\u00e9llo \u4e16\u754c \U0001F600";  // two, three and four tokens a character
  Service service({}, text);
  service.group.set_step_time(milliseconds(2));
  Heard heard = service.generate(prompt("x"));
  expect_well_formed(heard);
  EXPECT_EQ(heard.text(), text);

  v1::GenerateRequest cut = prompt("x");
  cut.mutable_stopping()->set_max_tokens(2);  // in the middle of the second character
  heard = service.generate(cut);
  expect_well_formed(heard);
  EXPECT_EQ(heard.text(), "h\uFFFD");
}

TEST(Generate, StopsAtStopTokensAndNotAtEosWhenItIsIgnored) {
  Service service;
  v1::GenerateRequest request = prompt("x");
  request.mutable_stopping()->add_stop_token_ids(3 + ',');
  Heard heard = service.generate(request);
  expect_well_formed(heard);
  EXPECT_EQ(heard.text(), "hello");
  EXPECT_EQ(heard.last().stop_token_id(), 3 + ',');

  request = prompt("x");
  request.mutable_stopping()->set_ignore_eos(true);
  request.mutable_stopping()->set_max_tokens(40);
  heard = service.generate(request);
  expect_well_formed(heard);
  EXPECT_EQ(heard.token_ids().size(), 40u);
  EXPECT_EQ(heard.last().finish_reason(), v1::FINISH_REASON_LENGTH);
}

TEST(Generate, ReturnsTheSeedGivenAndChoosesDifferentOnesOtherwise) {
  Service service;
  v1::GenerateRequest request = prompt("x");
  request.mutable_sampling()->set_seed(0xfeedfacecafebeef);
  EXPECT_EQ(service.generate(request).last().usage().seed(), 0xfeedfacecafebeefu);
  request.mutable_sampling()->set_seed(0);
  EXPECT_EQ(service.generate(request).last().usage().seed(), 0u);
  request.clear_sampling();
  const uint64_t first = service.generate(request).last().usage().seed();
  EXPECT_NE(service.generate(request).last().usage().seed(), first);
}

TEST(Generate, EchoesTheRequestId) {
  Service service;
  v1::GenerateRequest request = prompt("x");
  request.set_request_id("job-7");
  grpc::ClientContext context;
  service.generate(request, &context);
  const auto& metadata = context.GetServerInitialMetadata();
  const auto found = metadata.find("x-request-id");
  ASSERT_NE(found, metadata.end());
  EXPECT_EQ(found->second, "job-7");
}

// ---------------------------------------------------------------------------------------------------------- bad input

struct BadInput {
  const char* field;
  void (*spoil)(v1::GenerateRequest*);
  grpc::StatusCode code = grpc::StatusCode::INVALID_ARGUMENT;
};

TEST(Generate, RefusesBadInputNamingTheField) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr int32_t kMin = std::numeric_limits<int32_t>::min(), kMax = std::numeric_limits<int32_t>::max();
  const BadInput cases[] = {
      {"input", [](auto* r) { r->clear_input(); }},
      {"prompt", [](auto* r) { r->set_prompt(""); }},
      {"token_ids.ids", [](auto* r) { r->mutable_token_ids(); }},
      {"token_ids.ids[1]", [](auto* r) { r->mutable_token_ids()->add_ids(0), r->mutable_token_ids()->add_ids(263); }},
      {"token_ids.ids[0]", [](auto* r) { r->mutable_token_ids()->add_ids(-1); }},
      {"token_ids.ids[0]", [](auto* r) { r->mutable_token_ids()->add_ids(kMin); }},
      {"chat.messages", [](auto* r) { r->mutable_chat(); }},
      {"role", [](auto* r) { r->mutable_chat()->add_messages()->set_role("emperor"); }},
      {"chat.date",
       [](auto* r) { r->mutable_chat()->add_messages(), r->mutable_chat()->set_date(std::string(100, '1')); }},
      {"sampling.temperature", [](auto* r) { r->mutable_sampling()->set_temperature(-0.5f); }},
      {"sampling.presence_penalty", [](auto* r) { r->mutable_sampling()->set_presence_penalty(2.5f); }},
      {"sampling.frequency_penalty", [](auto* r) { r->mutable_sampling()->set_frequency_penalty(kNan); }},
      {"sampling.repetition_penalty", [](auto* r) { r->mutable_sampling()->set_repetition_penalty(0); }},
      {"sampling.repetition_penalty", [](auto* r) { r->mutable_sampling()->set_repetition_penalty(kInf); }},
      {"sampling.logit_bias[263]", [](auto* r) { (*r->mutable_sampling()->mutable_logit_bias())[263] = 1; }},
      {"sampling.logit_bias[-1]", [](auto* r) { (*r->mutable_sampling()->mutable_logit_bias())[-1] = 1; }},
      {"sampling.logit_bias[7]", [](auto* r) { (*r->mutable_sampling()->mutable_logit_bias())[7] = 101; }},
      {"sampling.logit_bias[7]", [](auto* r) { (*r->mutable_sampling()->mutable_logit_bias())[7] = kNan; }},
      {"sampling.allowed_token_ids[0]", [](auto* r) { r->mutable_sampling()->add_allowed_token_ids(kMax); }},
      {"sampling.bad_words[0]", [](auto* r) { r->mutable_sampling()->add_bad_words(""); }},
      {"sampling.bad_words[0]", [](auto* r) { r->mutable_sampling()->add_bad_words(std::string(300, 'x')); }},
      {"sampling.n", [](auto* r) { r->mutable_sampling()->set_n(0); }},
      {"sampling.n", [](auto* r) { r->mutable_sampling()->set_n(65); }},
      {"prompt_logprobs", [](auto* r) { r->set_prompt_logprobs(21); }},
      {"prompt_logprobs", [](auto* r) { r->set_prompt_logprobs(-1); }},
      {"priority", [](auto* r) { r->set_priority(10); }},
      {"cache_salt", [](auto* r) { r->set_cache_salt(std::string(257, 's')); }},
      {"echo", [](auto* r) { r->mutable_chat()->add_messages()->set_role("user"), r->set_echo(true); }},
      {"sampling.temperature", [](auto* r) { r->mutable_sampling()->set_temperature(kNan); }},
      {"sampling.temperature", [](auto* r) { r->mutable_sampling()->set_temperature(kInf); }},
      {"sampling.top_p", [](auto* r) { r->mutable_sampling()->set_top_p(0); }},
      {"sampling.top_p", [](auto* r) { r->mutable_sampling()->set_top_p(1.01f); }},
      {"sampling.top_p", [](auto* r) { r->mutable_sampling()->set_top_p(kNan); }},
      {"sampling.top_k", [](auto* r) { r->mutable_sampling()->set_top_k(-1); }},
      {"sampling.top_k", [](auto* r) { r->mutable_sampling()->set_top_k(kMin); }},
      {"sampling.min_p", [](auto* r) { r->mutable_sampling()->set_min_p(-0.1f); }},
      {"sampling.min_p", [](auto* r) { r->mutable_sampling()->set_min_p(kInf); }},
      {"stopping.max_tokens", [](auto* r) { r->mutable_stopping()->set_max_tokens(0); }},
      {"stopping.max_tokens", [](auto* r) { r->mutable_stopping()->set_max_tokens(-1); }},
      {"stopping.max_tokens", [](auto* r) { r->mutable_stopping()->set_max_tokens(kMax); }},
      {"stopping.min_tokens", [](auto* r) { r->mutable_stopping()->set_min_tokens(-1); }},
      {"stopping.min_tokens", [](auto* r) { r->mutable_stopping()->set_min_tokens(kMax); }},
      {"stopping.min_tokens",
       [](auto* r) { r->mutable_stopping()->set_min_tokens(5), r->mutable_stopping()->set_max_tokens(4); }},
      {"stopping.stop[0]", [](auto* r) { r->mutable_stopping()->add_stop(std::string()); }},
      {"stopping.stop[0]", [](auto* r) { r->mutable_stopping()->add_stop(std::string(2000, 'x')); }},
      {"stopping.stop",
       [](auto* r) {
         for (int i = 0; i < 17; ++i) r->mutable_stopping()->add_stop(std::string(1, 'x'));
       }},
      {"stopping.stop_token_ids[0]", [](auto* r) { r->mutable_stopping()->add_stop_token_ids(263); }},
      {"stopping.stop_token_ids[0]", [](auto* r) { r->mutable_stopping()->add_stop_token_ids(-5); }},
      {"stopping.stop_token_ids",
       [](auto* r) {
         for (int i = 0; i < 65; ++i) r->mutable_stopping()->add_stop_token_ids(i);
       }},
      {"logprobs", [](auto* r) { r->set_logprobs(21); }},
      {"logprobs", [](auto* r) { r->set_logprobs(-1); }},
      {"request_id", [](auto* r) { r->set_request_id(std::string(200, 'x')); }},
      {"context", [](auto* r) { r->set_prompt(std::string(5000, 'x')); }, grpc::StatusCode::OUT_OF_RANGE},
      {"context",
       [](auto* r) {
         for (int i = 0; i < 4096; ++i) r->mutable_token_ids()->add_ids(5);
       },
       grpc::StatusCode::OUT_OF_RANGE},
  };
  Service service;
  for (const BadInput& bad : cases) {
    v1::GenerateRequest request = prompt("hi");
    bad.spoil(&request);
    const Heard heard = service.generate(request);
    EXPECT_EQ(heard.status.error_code(), bad.code) << bad.field << ": " << heard.status.error_message();
    EXPECT_TRUE(absl::StrContains(heard.status.error_message(), bad.field))
        << bad.field << ": " << heard.status.error_message();
    EXPECT_TRUE(heard.messages.empty());
    EXPECT_LT(heard.status.error_message().size() + heard.status.error_details().size(), 4000u);
  }
  EXPECT_EQ(service.engine->stats().prompt_tokens, 0u);  // none came as far as a step
  expect_well_formed(service.generate(prompt("hi")));    // and all is well
}

TEST(Generate, NamesEveryBadFieldAtOnceInGoogleRpcDetails) {
  Service service;
  v1::GenerateRequest request = prompt("hi");
  request.mutable_sampling()->set_temperature(-1);
  request.mutable_sampling()->set_top_p(7);
  request.set_logprobs(99);
  const Heard heard = service.generate(request);
  google::rpc::Status status;
  ASSERT_TRUE(status.ParseFromString(heard.status.error_details()));
  EXPECT_EQ(status.code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(status.message(), heard.status.error_message());
  ASSERT_EQ(status.details_size(), 2) << "ErrorInfo, and this";
  google::rpc::BadRequest details;
  ASSERT_TRUE(status.details(0).UnpackTo(&details) || status.details(1).UnpackTo(&details));
  ASSERT_EQ(details.field_violations_size(), 3);
  EXPECT_EQ(details.field_violations(0).field(), "sampling.temperature");
  EXPECT_EQ(details.field_violations(0).description(), "must be 0 (greedy) or a positive number, found -1");
  EXPECT_EQ(details.field_violations(1).field(), "sampling.top_p");
  EXPECT_EQ(details.field_violations(2).field(), "logprobs");
}

TEST(Generate, RefusesChatWithAModelThatHasNoKnownFormatAndServesItsPrompts) {
  ServedModel model = fake_model();
  model.chat = absl::FailedPreconditionError("this model's chat template is unknown; known are Llama 3 and ChatML");
  Service service({}, "hello", std::move(model));
  v1::GenerateRequest request;
  request.mutable_chat()->add_messages()->set_role("user");
  const Heard heard = service.generate(request);
  EXPECT_EQ(heard.status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_TRUE(absl::StrContains(heard.status.error_message(), "ChatML"));
  expect_well_formed(service.generate(prompt("hi")));
}

TEST(Generate, RefusesMessagesAndMetadataThatAreTooLargeAndCompressedOnes) {
  Service service;
  const Heard large = service.generate(prompt(std::string(5 << 20, 'x')));
  EXPECT_EQ(large.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << large.status.error_message();

  {
    // On a connection of its own, because the server closes it.
    grpc::ChannelArguments own_connection;
    own_connection.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    auto stub = v1::InferenceService::NewStub(
        grpc::CreateCustomChannel(service.server->address(), grpc::InsecureChannelCredentials(), own_connection));
    grpc::ClientContext heavy;
    heavy.AddMetadata("x-padding", std::string(64 << 10, 'x'));
    auto reader = stub->Generate(&heavy, prompt("x"));
    v1::GenerateResponse message;
    EXPECT_FALSE(reader->Read(&message));
    EXPECT_FALSE(reader->Finish().ok());
  }

  grpc::ClientContext compressed;
  compressed.set_compression_algorithm(GRPC_COMPRESS_GZIP);
  const Heard zipped = service.generate(prompt(std::string(100'000, 'x')), &compressed);
  EXPECT_EQ(zipped.status.error_code(), grpc::StatusCode::UNIMPLEMENTED) << zipped.status.error_message();
  expect_well_formed(service.generate(prompt("hi")));
}

// ---------------------------------------------------------------------------------------------------- model's defaults

TEST(AcceptRequest, TakesDefaultsFromTheGenerationConfig) {
  ServedModel model = fake_model();
  Service service({}, "hello", model);
  model.generation_config = {.eos_token_ids = {},
                             .do_sample = std::nullopt,
                             .temperature = 0.6f,
                             .top_p = 0.9f,
                             .top_k = 40,
                             .repetition_penalty = std::nullopt};
  v1::GenerateRequest request = prompt("x");
  SlotSampling sampling = accept_request(request, model)->request.sampling;
  EXPECT_EQ(sampling.temperature, 0.6f);
  EXPECT_EQ(sampling.top_p, 0.9f);
  EXPECT_EQ(sampling.top_k, 40);

  model.generation_config.do_sample = false;
  EXPECT_EQ(accept_request(request, model)->request.sampling.temperature, 0.0f);
  request.mutable_sampling()->set_temperature(1.5f);
  request.mutable_sampling()->set_top_k(0);
  sampling = accept_request(request, model)->request.sampling;
  EXPECT_EQ(sampling.temperature, 1.5f);
  EXPECT_EQ(sampling.top_k, 0);

  model.generation_config = {};
  request.clear_sampling();
  sampling = accept_request(request, model)->request.sampling;
  EXPECT_EQ(sampling.temperature, 1.0f);
  EXPECT_EQ(sampling.top_p, 1.0f);
  EXPECT_EQ(sampling.top_k, 0);
}

// ---------------------------------------------------------------------------------------------- cancels and lost
// clients

TEST(Generate, FreesItsBlocksWhenTheClientCancels) {
  Service service;
  service.group.set_step_time(milliseconds(1));
  v1::GenerateRequest request = prompt("x");
  request.mutable_stopping()->set_ignore_eos(true);
  grpc::ClientContext context;
  auto reader = service.inference->Generate(&context, request);
  v1::GenerateResponse message;
  ASSERT_TRUE(reader->Read(&message));
  context.TryCancel();
  while (reader->Read(&message)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  service.expect_quiet();
  EXPECT_LT(service.engine->stats().generated_tokens, 4000u);  // it did not run to the end
}

TEST(Generate, FreesItsBlocksWhenTheDeadlinePasses) {
  Service service;
  service.group.set_step_time(milliseconds(1));
  v1::GenerateRequest request = prompt("x");
  request.mutable_stopping()->set_ignore_eos(true);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + milliseconds(50));
  const Heard heard = service.generate(request, &context);
  EXPECT_EQ(heard.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  service.expect_quiet();
  EXPECT_LT(service.engine->stats().generated_tokens, 4000u);
}

TEST(Generate, SurvivesAStormOfCancelsAtEveryMoment) {
  Service service;
  service.group.set_step_time(std::chrono::microseconds(100));
  std::vector<std::thread> clients;
  std::atomic<int> finished{0}, cancelled{0};
  for (int c = 0; c < 4; ++c) {
    clients.emplace_back([&, c] {
      std::mt19937 random(c);
      for (int i = 0; i < 250; ++i) {
        v1::GenerateRequest request = prompt("tell me more");
        request.mutable_stopping()->set_max_tokens(1 + random() % 40);
        request.mutable_stopping()->set_ignore_eos(true);
        if (random() % 8 == 0) request.mutable_sampling()->set_temperature(-1);
        grpc::ClientContext context;
        auto reader = service.inference->Generate(&context, request);
        std::thread canceller([&, micros = random() % 4000] {
          std::this_thread::sleep_for(std::chrono::microseconds(micros));
          context.TryCancel();
        });
        int terminals = 0;
        for (v1::GenerateResponse message; reader->Read(&message);) {
          EXPECT_EQ(terminals, 0);  // nothing after the end
          terminals += message.finish_reason() != v1::FINISH_REASON_UNSPECIFIED;
        }
        const grpc::Status status = reader->Finish();
        canceller.join();
        if (status.ok()) {
          EXPECT_EQ(terminals, 1);
          ++finished;
        } else {
          cancelled += status.error_code() == grpc::StatusCode::CANCELLED;
        }
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_GT(finished, 0);
  EXPECT_GT(cancelled, 0);
  service.expect_quiet();
}

TEST(Generate, DropsAClientThatDoesNotRead) {
  ServedModel model = fake_model();
  model.limits.max_context = 1 << 20;
  model.limits.blocks = 1 << 16;
  model.limits.block_tokens = 16;
  ServerOptions options;
  options.streams = {.stall = absl::Seconds(60), .unread_tokens = 2000};
  Service service(options, "hello", std::move(model));
  v1::GenerateRequest request = prompt("x");
  request.mutable_stopping()->set_ignore_eos(true);
  request.set_logprobs(20);
  grpc::ClientContext context;
  auto reader = service.inference->Generate(&context, request);
  service.expect_quiet();  // although nobody reads: the request is gone
  EXPECT_LT(service.engine->stats().generated_tokens, 500'000u);
  for (v1::GenerateResponse message; reader->Read(&message);) EXPECT_FALSE(message.has_usage());
  EXPECT_FALSE(reader->Finish().ok());
}

TEST(Generate, EndsEveryStreamWithTheCauseWhenTheWorkersFail) {
  Service service;
  service.group.set_step_time(milliseconds(1));
  v1::GenerateRequest request = prompt("x");
  request.mutable_stopping()->set_ignore_eos(true);
  std::vector<std::thread> clients;
  std::vector<Heard> heard(8);
  for (Heard& one : heard) clients.emplace_back([&] { one = service.generate(request); });
  while (service.engine->stats().running < 8) std::this_thread::sleep_for(milliseconds(1));
  service.group.fail(absl::UnavailableError("rank 2 is lost"));
  for (std::thread& client : clients) client.join();
  for (const Heard& one : heard) {
    EXPECT_EQ(one.status.error_code(), grpc::StatusCode::UNAVAILABLE);
    EXPECT_TRUE(absl::StrContains(one.status.error_message(), "rank 2 is lost")) << one.status.error_message();
  }
  EXPECT_EQ(service.generate(request).status.error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST(Server, ShutsDownTellingEveryStreamWhy) {
  Service service;
  service.group.set_step_time(milliseconds(1));
  v1::GenerateRequest request = prompt("x");
  request.mutable_stopping()->set_ignore_eos(true);
  std::vector<std::thread> clients;
  std::vector<Heard> heard(8);
  for (Heard& one : heard) clients.emplace_back([&] { one = service.generate(request); });
  while (service.engine->stats().running < 8) std::this_thread::sleep_for(milliseconds(1));
  service.server->drain();
  EXPECT_EQ(service.generate(request).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(service.engine->stats().running, 8);  // those under way go on
  service.server->shutdown(absl::UnavailableError("rank 0 got SIGTERM"), absl::Seconds(10));
  for (std::thread& client : clients) client.join();
  for (const Heard& one : heard) {
    EXPECT_EQ(one.status.error_code(), grpc::StatusCode::UNAVAILABLE);
    EXPECT_EQ(one.status.error_message(), "rank 0 got SIGTERM");
  }
  service.expect_quiet();
}

// ------------------------------------------------------------------------------------------------ the smaller methods

TEST(Tokenize, IsUndoneByDetokenize) {
  Service service;
  v1::TokenizeRequest request;
  request.set_text("hello <|im_end|> w\u00f6rld");
  v1::TokenizeResponse ids;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(service.inference->Tokenize(&context, request, &ids).ok());
  }
  const std::vector<int32_t> expected = service.tokenizer.encode(request.text(), true);
  EXPECT_EQ(std::vector<int32_t>(ids.token_ids().begin(), ids.token_ids().end()), expected);
  v1::DetokenizeRequest back;
  *back.mutable_token_ids() = ids.token_ids();
  v1::DetokenizeResponse text;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(service.inference->Detokenize(&context, back, &text).ok());
  }
  EXPECT_EQ(text.text(), request.text());

  request.set_parse_special(true);
  {
    grpc::ClientContext context;
    ASSERT_TRUE(service.inference->Tokenize(&context, request, &ids).ok());
  }
  EXPECT_EQ(std::count(ids.token_ids().begin(), ids.token_ids().end(), kFakeImEnd), 1);

  back.add_token_ids(-3);
  grpc::ClientContext context;
  const grpc::Status status = service.inference->Detokenize(&context, back, &text);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_TRUE(absl::StrContains(status.error_message(), "found -3")) << status.error_message();
}

TEST(ControlService, SaysWhatTheServerAndTheModelAre) {
  Service service;
  v1::GetServerInfoResponse server;
  v1::GetModelInfoResponse model;
  v1::GetLoadResponse load;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(service.control->GetServerInfo(&context, {}, &server).ok());
  }
  EXPECT_EQ(server.ranks(), 2);
  EXPECT_EQ(server.kv_blocks(), fake_limits().blocks);
  EXPECT_EQ(server.max_context(), fake_limits().max_context);
  {
    grpc::ClientContext context;
    ASSERT_TRUE(service.control->GetModelInfo(&context, {}, &model).ok());
  }
  EXPECT_EQ(model.model(), "fake");
  EXPECT_EQ(model.vocab_size(), 263);
  EXPECT_EQ(model.chat_format(), "chatml");
  EXPECT_EQ(model.bos_token_id(), -1);
  service.generate(prompt("hi"));
  service.expect_quiet();
  {
    grpc::ClientContext context;
    ASSERT_TRUE(service.control->GetLoad(&context, {}, &load).ok());
  }
  EXPECT_EQ(load.kv_blocks_free(), load.kv_blocks_total());
  EXPECT_GT(load.generated_tokens(), 0u);
}

// ------------------------------------------------------------------------------------------------ health, port,
// address

grpc::health::v1::HealthCheckResponse::ServingStatus health_of(const std::shared_ptr<grpc::Channel>& channel,
                                                               const std::string& service) {
  auto stub = grpc::health::v1::Health::NewStub(channel);
  grpc::ClientContext context;
  grpc::health::v1::HealthCheckRequest request;
  request.set_service(service);
  grpc::health::v1::HealthCheckResponse response;
  const grpc::Status status = stub->Check(&context, request, &response);
  EXPECT_TRUE(status.ok()) << service << ": " << status.error_message();
  return response.status();
}

TEST(Server, IsHealthyOnlyWhileItServes) {
  using grpc::health::v1::HealthCheckResponse;
  TemporaryDirectory directory;
  const std::string address_file = directory.path() + "/address.json";
  auto started = Server::start({.address = "127.0.0.1:0",
                                .address_file = address_file,
                                .access = {},
                                .advertise_host = {},
                                .job_id = "17",
                                .job_end = absl::FromUnixSeconds(1'800'000'000),
                                .streams = {}});
  ASSERT_TRUE(started.ok()) << started.status();
  std::unique_ptr<Server> server = *std::move(started);
  auto channel = grpc::CreateChannel(server->address(), grpc::InsecureChannelCredentials());
  const std::vector<std::string> names = {"", "octet.v1.InferenceService", "octet.v1.ControlService"};
  for (const std::string& name : names) EXPECT_EQ(health_of(channel, name), HealthCheckResponse::NOT_SERVING) << name;
  EXPECT_NE(access(address_file.c_str(), F_OK), 0);
  {
    auto stub = v1::InferenceService::NewStub(channel);
    grpc::ClientContext context;
    auto reader = stub->Generate(&context, prompt("x"));
    v1::GenerateResponse message;
    EXPECT_FALSE(reader->Read(&message));
    const grpc::Status status = reader->Finish();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
    EXPECT_TRUE(absl::StrContains(status.error_message(), "loading")) << status.error_message();
  }

  auto model = std::make_shared<ServedModel>(fake_model());
  FakeWorkerGroup group({5});
  Engine engine({.limits = model->limits, .max_waiting = 4}, &group, [](const absl::Status&) {});
  ASSERT_TRUE(server->open({}, model, &engine).ok());
  for (const std::string& name : names) EXPECT_EQ(health_of(channel, name), HealthCheckResponse::SERVING) << name;
  nlohmann::json written;
  std::ifstream(address_file) >> written;
  EXPECT_EQ(written["grpc"], server->address());
  EXPECT_EQ(written["pid"], getpid());
  EXPECT_EQ(written["job_id"], "17");
  EXPECT_EQ(written["job_end"], "2027-01-15T08:00:00+00:00");

  server->drain();
  for (const std::string& name : names) EXPECT_EQ(health_of(channel, name), HealthCheckResponse::NOT_SERVING) << name;
  EXPECT_NE(access(address_file.c_str(), F_OK), 0) << "a server that drains is not to be found any more";
  server->shutdown(absl::UnavailableError("done"), absl::ZeroDuration());
}

TEST(Server, RefusesAPortInUseWithASentence) {
  auto first =
      Server::start({.address = "127.0.0.1:0", .address_file = {}, .access = {}, .advertise_host = {}, .streams = {}});
  ASSERT_TRUE(first.ok());
  const std::vector<std::string> parts = absl::StrSplit((*first)->address(), ':');
  for (const std::string& host : {std::string("127.0.0.1"), std::string("0.0.0.0"), std::string("[::]")}) {
    auto second = Server::start({.address = absl::StrCat(host, ":", parts[1]),
                                 .address_file = {},
                                 .access = {.insecure = true},
                                 .advertise_host = {},
                                 .streams = {}});
    EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable) << host << " " << second.status();
    EXPECT_TRUE(absl::StrContains(second.status().message(), absl::StrCat("port ", parts[1]))) << second.status();
  }
}

TEST(Server, NeverAdvertisesAWildcard) {
  auto any = Server::start(
      {.address = "0.0.0.0:0", .address_file = {}, .access = {.insecure = true}, .advertise_host = {}, .streams = {}});
  ASSERT_TRUE(any.ok()) << any.status();
  EXPECT_FALSE(absl::StartsWith((*any)->address(), "0.0.0.0")) << (*any)->address();
  EXPECT_FALSE(absl::EndsWith((*any)->address(), ":0"));
  auto named = Server::start({.address = "0.0.0.0:0",
                              .address_file = {},
                              .access = {.insecure = true},
                              .advertise_host = "node7.cluster",
                              .streams = {}});
  ASSERT_TRUE(named.ok());
  EXPECT_TRUE(absl::StartsWith((*named)->address(), "node7.cluster:"));
}

TEST(Server, RefusesAddressesThatMakeNoSense) {
  for (const char* address : {"", "localhost", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536", "127.0.0.1:-1", ":50051",
                              "::1:50051", "no.such.host.invalid:1"}) {
    auto server = Server::start(
        {.address = address, .address_file = {}, .access = {.insecure = true}, .advertise_host = {}, .streams = {}});
    EXPECT_EQ(server.status().code(), absl::StatusCode::kInvalidArgument) << address << ": " << server.status();
  }
  auto elsewhere = Server::start({.address = "192.0.2.1:0",
                                  .address_file = {},
                                  .access = {.insecure = true},
                                  .advertise_host = {},
                                  .streams = {}});
  EXPECT_EQ(elsewhere.status().code(), absl::StatusCode::kFailedPrecondition) << elsewhere.status();
}

TEST(Server, SaysWhenTheAddressFileCannotBeWritten) {
  ServerOptions options{.address = "127.0.0.1:0",
                        .address_file = "/nonexistent/address.json",
                        .access = {},
                        .advertise_host = {},
                        .streams = {}};
  auto server = Server::start(options);
  ASSERT_TRUE(server.ok());
  auto model = std::make_shared<ServedModel>(fake_model());
  FakeWorkerGroup group({5});
  Engine engine({.limits = model->limits, .max_waiting = 4}, &group, [](const absl::Status&) {});
  const absl::Status status = (*server)->open({}, model, &engine);
  EXPECT_TRUE(absl::StrContains(status.message(), "/nonexistent/address.json")) << status;
  server->reset();
}

// ---------------------------------------------------------------------------------------------------------------
// tokens

TEST(TokenFile, IsRefusedWhenOthersCanReadItOrItSaysNothing) {
  TemporaryDirectory directory;
  const auto start = [&](const std::string& token_file) {
    return Server::start({.address = "127.0.0.1:0",
                          .address_file = {},
                          .access = {.token_file = token_file},
                          .advertise_host = {},
                          .streams = {}})
        .status();
  };
  EXPECT_EQ(start(directory.path() + "/absent").code(), absl::StatusCode::kNotFound);
  const absl::Status open = start(directory.write("open", "secret\n", 0644));
  EXPECT_EQ(open.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(absl::StrContains(open.message(), "chmod 600")) << open;
  EXPECT_EQ(start(directory.write("empty", "")).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(start(directory.write("newlines", "\n\n")).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(start(directory.write("lines", "one\ntwo\n")).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(start(directory.write("huge", std::string(100'000, 'x'))).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(start(directory.path()).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(start(directory.write("good", "secret\r\n")).ok());
}

TEST(Server, AsksForATokenOrAWordWhenOthersCanReachIt) {
  TemporaryDirectory directory;
  ServerOptions options{.address = "0.0.0.0:0", .address_file = {}, .access = {}, .advertise_host = {}, .streams = {}};
  const absl::Status refused = Server::start(options).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(absl::StrContains(refused.message(), "--token-file")) << refused;
  EXPECT_TRUE(absl::StrContains(refused.message(), "--insecure")) << refused;
  options.access.token_file = directory.write("token", "secret\n");
  EXPECT_TRUE(Server::start(options).ok());
}

// Any method, any kind of stream: one empty message, then whatever comes first.
grpc::Status call(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                  const std::vector<std::pair<std::string, std::string>>& metadata, grpc::ByteBuffer* request = nullptr,
                  grpc::ByteBuffer* response = nullptr) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
  for (const auto& [key, value] : metadata) context.AddMetadata(key, value);
  grpc::GenericStub stub(channel);
  grpc::CompletionQueue queue;
  const auto wait = [&] {
    void* tag = nullptr;
    bool ok = false;
    queue.Next(&tag, &ok);
    return ok;
  };
  auto stream = stub.PrepareCall(&context, method, &queue);
  stream->StartCall(nullptr);
  grpc::Status status;
  if (wait()) {
    grpc::Slice nothing;
    grpc::ByteBuffer empty(&nothing, 1);
    stream->WriteLast(request != nullptr ? *request : empty, grpc::WriteOptions(), nullptr);
    if (wait()) {
      grpc::ByteBuffer first;
      stream->Read(&first, nullptr);
      if (wait()) {
        if (response != nullptr) response->Swap(&first);
        context.TryCancel();  // health's Watch never ends
        stream->Finish(&status, nullptr);
        wait();
        return grpc::Status::OK;
      }
    }
  }
  stream->Finish(&status, nullptr);
  wait();
  return status;
}

// All methods of all services that the server itself says it has, from their descriptors: a new one cannot be
// forgotten.
std::vector<std::string> methods_by_reflection(const std::shared_ptr<grpc::Channel>& channel,
                                               const std::string& token) {
  const google::protobuf::DescriptorPool* pool = google::protobuf::DescriptorPool::generated_pool();
  const auto make = [&](const char* name) {
    const google::protobuf::Descriptor* type = pool->FindMessageTypeByName(name);
    return std::unique_ptr<google::protobuf::Message>(
        google::protobuf::MessageFactory::generated_factory()->GetPrototype(type)->New());
  };
  auto request = make("grpc.reflection.v1alpha.ServerReflectionRequest");
  request->GetReflection()->SetString(request.get(), request->GetDescriptor()->FindFieldByName("list_services"), "*");
  const grpc::Slice bytes(request->SerializeAsString());
  grpc::ByteBuffer sent(&bytes, 1), received;
  const grpc::Status status = call(channel, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                                   {{"authorization", absl::StrCat("Bearer ", token)}}, &sent, &received);
  EXPECT_TRUE(status.ok()) << status.error_message();
  grpc::Slice flat;
  EXPECT_TRUE(received.DumpToSingleSlice(&flat).ok());
  auto response = make("grpc.reflection.v1alpha.ServerReflectionResponse");
  EXPECT_TRUE(response->ParseFromArray(flat.begin(), static_cast<int>(flat.size())));
  const google::protobuf::Message& list = response->GetReflection()->GetMessage(
      *response, response->GetDescriptor()->FindFieldByName("list_services_response"));
  const google::protobuf::FieldDescriptor* services = list.GetDescriptor()->FindFieldByName("service");
  std::vector<std::string> methods;
  for (int i = 0; i < list.GetReflection()->FieldSize(list, services); ++i) {
    const google::protobuf::Message& one = list.GetReflection()->GetRepeatedMessage(list, services, i);
    const std::string name = one.GetReflection()->GetString(one, one.GetDescriptor()->FindFieldByName("name"));
    EXPECT_FALSE(absl::StrContains(name, "internal")) << name;
    const google::protobuf::ServiceDescriptor* service = pool->FindServiceByName(name);
    if (service == nullptr) {
      ADD_FAILURE() << name << " has no descriptor";
      continue;
    }
    for (int m = 0; m < service->method_count(); ++m) {
      methods.push_back(absl::StrCat("/", name, "/", service->method(m)->name()));
    }
  }
  return methods;
}

TEST(TokenAuth, StandsBeforeEveryMethodOfEveryService) {
  TemporaryDirectory directory;
  ServerOptions options;
  options.access.token_file = directory.write("token", "s3cret\n");
  Service service(options);
  std::vector<std::string> methods = methods_by_reflection(service.channel, "s3cret");
  EXPECT_GE(methods.size(), 9u);  // Generate, Tokenize, Detokenize, 3 of control, 2 of health, reflection
  for (const char* expected :
       {"/octet.v1.InferenceService/Generate", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"}) {
    EXPECT_NE(std::find(methods.begin(), methods.end(), expected), methods.end()) << expected;
  }
  methods.push_back("/octet.v1.InferenceService/NoSuchMethod");
  methods.push_back("/octet.internal.v1.WorkerService/Work");

  using Metadata = std::vector<std::pair<std::string, std::string>>;
  const Metadata bad[] = {
      {},
      {{"authorization", "Bearer wrong"}},
      {{"authorization", "Bearer s3cre"}},
      {{"authorization", "Bearer s3crets"}},
      {{"authorization", "Bearer S3CRET"}},
      {{"authorization", "Bearer "}},
      {{"authorization", "s3cret"}},
      {{"authorization", "Basic s3cret"}},
      {{"authorization", "Bearer s3cret"}, {"authorization", "Bearer wrong"}},
      {{"x-authorization", "Bearer s3cret"}},
  };
  for (const std::string& method : methods) {
    for (const Metadata& metadata : bad) {
      const grpc::Status status = call(service.channel, method, metadata);
      EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAUTHENTICATED) << method << ": " << status.error_message();
    }
    for (const char* good : {"Bearer s3cret", "bearer s3cret"}) {
      const grpc::Status status = call(service.channel, method, {{"authorization", good}});
      EXPECT_NE(status.error_code(), grpc::StatusCode::UNAUTHENTICATED) << method;
      EXPECT_NE(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED) << method;
    }
  }
  EXPECT_EQ(
      call(service.channel, "/octet.internal.v1.WorkerService/Work", {{"authorization", "Bearer s3cret"}}).error_code(),
      grpc::StatusCode::UNIMPLEMENTED);
  std::printf("%zu methods x %zu ways of not having the token: all UNAUTHENTICATED\n", methods.size(), std::size(bad));
}

}  // namespace
}  // namespace octet
