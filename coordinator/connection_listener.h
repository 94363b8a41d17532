// ConnectionListener: accepts TCP connections for a gRPC server, and never so many that the process runs out of file
// descriptors: gRPC's own listener of this generation does not recover from that. A few descriptors are always left,
// for whoever else needs one; connections beyond them are closed at once.
#pragma once

#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "coordinator/listen_address.h"

namespace octet {

class ConnectionListener {
 public:
  // Listens at every address that the host stands for; address.port 0 takes a free one. Errors as check_bindable(),
  // naming `option`.
  static absl::StatusOr<std::unique_ptr<ConnectionListener>> listen(const ListenAddress& address,
                                                                    absl::string_view option);
  ~ConnectionListener();  // stops accepting
  ConnectionListener(const ConnectionListener&) = delete;
  ConnectionListener& operator=(const ConnectionListener&) = delete;

  int port() const { return port_; }

  // From now on connections go to `take`, which owns the descriptor; on a thread of this object's. Once.
  void start(std::function<void(int listener, int connection)> take);

 private:
  ConnectionListener() = default;
  void run();
  void accept_from(int listener);

  std::vector<int> listeners_;
  int port_ = 0;
  int stop_event_ = -1;
  std::function<void(int listener, int connection)> take_;
  std::thread thread_;
};

}  // namespace octet
