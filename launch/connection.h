// Connection: how a client command finds its server (address or address file, token, TLS, patience) and talks to it.
// Invariant: whatever it waits for or calls, cancel() ends it.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace CLI {
class App;
}

namespace octet {

struct ConnectionOptions {
  std::string address = "127.0.0.1:50051";
  std::string address_file;  // wins over address
  std::string token_file;
  std::string tls_ca, tls_cert, tls_key;  // PEM files; empty: plain text, or no certificate of the client's
  double wait_seconds = 0;                // for a server that is starting or loading
};

// Parsing fills *options, which outlives the app.
void add_connection_options(CLI::App& command, ConnectionOptions* options);

class Connection {
 public:
  explicit Connection(const ConnectionOptions& options);
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // Until the server can be asked. UNAVAILABLE says what to do about it.
  absl::Status open();

  // What follows is for after open().
  const std::string& address() const { return address_; }
  const std::shared_ptr<grpc::Channel>& channel() const { return channel_; }
  // A TCP connection of its own to the same server; `arguments` come on top of open()'s.
  std::shared_ptr<grpc::Channel> new_channel(grpc::ChannelArguments arguments) const;
  // A context for one call, which shows the token.
  std::unique_ptr<grpc::ClientContext> make_context() const;
  // Returns call(context), which cancel() can end. One at a time.
  template <typename Call>
  auto with_context(std::unique_ptr<grpc::ClientContext> context, Call call) {
    set_context(context.get());
    auto result = call(context.get());
    set_context(nullptr);
    return result;
  }

  // Any thread: ends whatever is under way.
  void cancel();

 private:
  absl::StatusOr<std::string> find_address();
  absl::Status read_credentials();
  absl::Status wait_for_channel();
  absl::Status wait_for_model();
  bool may_wait();
  bool cancelled();
  void say(const std::string& what);
  void set_context(grpc::ClientContext* context);

  const ConnectionOptions options_;
  const absl::Time give_up_;
  std::string address_;
  std::string token_;
  std::string said_;
  std::shared_ptr<grpc::ChannelCredentials> credentials_;
  std::shared_ptr<grpc::Channel> channel_;

  std::mutex mutex_;
  bool cancelled_ = false;
  grpc::ClientContext* context_ = nullptr;  // of the call under way
};

}  // namespace octet
