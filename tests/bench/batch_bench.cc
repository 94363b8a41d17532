// The same lines through `octet batch` and through `octet serve`, in turns: tokens/s of each pair, and their ratio.
// Both do the same work in the same steps; batch has no streams to write, but a journal to keep.
//   batch_bench MODEL [RANKS] [LINES] [PAIRS]
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "octet/v1/inference_service.grpc.pb.h"
#include "tests/octet_server.h"
#include "tests/process.h"

namespace octet {
namespace {

using nlohmann::json;

constexpr int kSequences = 64;            // that run at once, in both
constexpr int kStreams = 2 * kSequences;  // that a client of the server has open: as many lines as batch has in flight

struct Line {
  std::string prompt;
  int max_tokens = 0;
};

std::vector<Line> make_lines(int count) {
  std::vector<Line> lines;
  for (int i = 0; i < count; ++i) {
    lines.push_back(
        {.prompt = absl::StrCat("Here is a story about the number ", i, ":"), .max_tokens = 16 + i * 37 % 64});
  }
  return lines;
}

double batch_tokens_per_second(const std::string& model, int ranks, const std::vector<Line>& lines) {
  const std::string input = fresh_path("in.jsonl"), output = fresh_path("out.jsonl");
  std::ofstream file(input);
  for (size_t i = 0; i < lines.size(); ++i) {
    const json body = {
        {"prompt", lines[i].prompt}, {"max_tokens", lines[i].max_tokens}, {"temperature", 0}, {"ignore_eos", true}};
    file << json{{"custom_id", absl::StrCat(i)}, {"method", "POST"}, {"url", "/v1/completions"}, {"body", body}}
         << "\n";
  }
  file.close();
  const Finished run = run_command(mpirun(ranks, {OCTET_BINARY, "batch", "--model", model, "--input", input, "--output",
                                                  output, "--max-sequences", absl::StrCat(kSequences)}),
                                   mpirun_environment(), std::chrono::seconds(3600));
  if (run.status != 0) {
    std::fprintf(stderr, "%s\n", run.err.c_str());
    std::exit(1);
  }
  std::ifstream status_file(output + ".octet/status.json");
  const json status = json::parse(status_file);
  return status["completion_tokens"].get<double>() / status["seconds"].get<double>();
}

// Every stream is a thread that takes the next line until there is none.
double server_tokens_per_second(const std::string& model, int ranks, const std::vector<Line>& lines) {
  const Server server(model, ranks, {"--max-sequences", absl::StrCat(kSequences), "--kv-memory", "1GiB"});
  const auto stub =
      v1::InferenceService::NewStub(grpc::CreateChannel(server.address(), grpc::InsecureChannelCredentials()));
  std::atomic<size_t> next = 0;
  std::atomic<int64_t> tokens = 0;
  const auto begin = std::chrono::steady_clock::now();
  std::vector<std::thread> streams;
  for (int i = 0; i < kStreams; ++i) {
    streams.emplace_back([&] {
      for (size_t line; (line = next++) < lines.size();) {
        v1::GenerateRequest request;
        request.set_prompt(lines[line].prompt);
        request.mutable_sampling()->set_temperature(0);
        request.mutable_stopping()->set_max_tokens(lines[line].max_tokens);
        request.mutable_stopping()->set_ignore_eos(true);
        grpc::ClientContext context;
        const auto reader = stub->Generate(&context, request);
        for (v1::GenerateResponse message; reader->Read(&message);) tokens += message.tokens_size();
        if (!reader->Finish().ok()) std::exit(1);
      }
    });
  }
  for (std::thread& stream : streams) stream.join();
  return static_cast<double>(tokens) / std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace
}  // namespace octet

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: batch_bench MODEL [RANKS] [LINES] [PAIRS]\n");
    return 2;
  }
  const auto number = [&](int i, int otherwise) { return argc > i ? std::atoi(argv[i]) : otherwise; };
  const int ranks = number(2, 1), pairs = number(4, 3);
  const std::vector<octet::Line> lines = octet::make_lines(number(3, 256));
  std::vector<double> ratios;
  for (int pair = 0; pair < pairs; ++pair) {
    const double server = octet::server_tokens_per_second(argv[1], ranks, lines);
    const double batch = octet::batch_tokens_per_second(argv[1], ranks, lines);
    ratios.push_back(batch / server);
    std::printf("%zu lines on %d ranks: batch %.1f tokens/s, server %.1f tokens/s, ratio %.3f\n", lines.size(), ranks,
                batch, server, ratios.back());
    std::fflush(stdout);
  }
  std::ranges::sort(ratios);
  std::printf("median ratio %.3f\n", ratios[ratios.size() / 2]);
}
