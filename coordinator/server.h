// Server: the public gRPC port. Inference, control, health and reflection behind one listening address, one token check
// and one set of limits. Invariant: health says SERVING only between open() and drain().
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "coordinator/call_report.h"
#include "coordinator/engine.h"
#include "coordinator/inference_service.h"
#include "coordinator/served_model.h"
#include "coordinator/server_credentials.h"

namespace octet {

struct ServerOptions {
  std::string address;          // HOST:PORT; port 0: one that is free
  std::string address_file;     // there from open() to drain(); empty: none
  std::string control_address;  // HOST:PORT or unix:/PATH of ControlService; empty: beside the others
  AccessOptions access;         // of both; a Unix socket is its owner's alone and needs none
  std::string advertise_host;   // what others call this machine; empty: its host name. Only for wildcard addresses
  // Of the batch system's job, for the address file: its name, empty for none, and when it will end.
  std::string job_id;
  absl::Time job_end = absl::InfiniteFuture();
  bool channelz = false;  // serve grpc.channelz, for looking into connections
  StreamLimits streams;
  std::function<void()> on_drain;  // ControlService.Drain was called. Any thread; returns at once
  CallListener on_call_end;
};

class Server {
 public:
  // Listens; every call but health and reflection is UNAVAILABLE until open(). INVALID_ARGUMENT for an address that is
  // none, FAILED_PRECONDITION for one that needs a token, UNAVAILABLE for a port in use: each says what helps. Before a
  // model is loaded is the time to find out.
  static absl::StatusOr<std::unique_ptr<Server>> start(const ServerOptions& options);
  ~Server();  // shutdown() without patience

  // HOST:PORT for clients: the port that was bound, never a wildcard.
  const std::string& address() const;
  // Of ControlService; where the options name none, address().
  const std::string& control_address() const;

  // Serves. `engine` must outlive shutdown(). Fails when the address file cannot be written.
  absl::Status open(const ServerFacts& facts, std::shared_ptr<const ServedModel> model, Engine* engine);

  // Health says NOT_SERVING, the address file is gone, new requests are refused with UNAVAILABLE, those under way go
  // on. Any thread.
  void drain();

  // Ends every stream with UNAVAILABLE and this cause, gives clients until `patience` has passed to take it, and stops
  // listening. Once; not on a gRPC thread.
  void shutdown(const absl::Status& cause, absl::Duration patience);

 private:
  struct Impl;
  explicit Server(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace octet
