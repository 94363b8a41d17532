#include "worker/collective/thread_communicator.h"

#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <numeric>
#include <utility>

#include "kernels/memory.h"

namespace octet {
namespace {

// What travels between pretended nodes of one process.
class Mailboxes {
 public:
  void post(int from, int to, const NodeLink::Transfer& transfer) {
    const auto* bytes = static_cast<const std::byte*>(transfer.data);
    const std::lock_guard lock(mutex_);
    boxes_[{from, to}].emplace_back(bytes, bytes + transfer.bytes);
    posted_.notify_all();
  }

  void fetch(int from, int to, const NodeLink::Transfer& transfer, const WaitPolicy& policy) {
    Waiting waiting(policy);
    std::unique_lock lock(mutex_);
    std::deque<std::vector<std::byte>>& box = boxes_[{from, to}];
    while (box.empty()) {
      if (waiting.poll_again()) {
        lock.unlock();
        lock.lock();
        continue;
      }
      posted_.wait_for(lock, Waiting::kSleep);
      waiting.slept();
    }
    OCTET_CHECK(static_cast<int64_t>(box.front().size()) == transfer.bytes, "nodes disagree on the size of a transfer");
    std::memcpy(transfer.data, box.front().data(), box.front().size());
    box.pop_front();
  }

 private:
  std::mutex mutex_;
  std::condition_variable posted_;
  std::map<std::pair<int, int>, std::deque<std::vector<std::byte>>> boxes_;  // by (from, to)
};

class MailboxLink : public NodeLink {
 public:
  MailboxLink(std::shared_ptr<Mailboxes> mailboxes, int node, WaitPolicy policy)
      : mailboxes_(std::move(mailboxes)), node_(node), policy_(std::move(policy)) {}

  void exchange(std::span<const Transfer> sends, std::span<const Transfer> receives) override {
    for (const Transfer& send : sends) mailboxes_->post(node_, send.node, send);
    for (const Transfer& receive : receives) mailboxes_->fetch(receive.node, node_, receive, policy_);
  }

 private:
  const std::shared_ptr<Mailboxes> mailboxes_;
  const int node_;
  const WaitPolicy policy_;
};

// Keeps a node's window alive as long as one of its ranks.
class ThreadCommunicator : public WindowCommunicator {
 public:
  ThreadCommunicator(const RankMap& map, int rank, std::unique_ptr<SharedWindow> window, std::unique_ptr<NodeLink> link,
                     std::shared_ptr<Buffer> memory)
      : WindowCommunicator(map, rank, std::move(window), std::move(link)), memory_(std::move(memory)) {}

 private:
  const std::shared_ptr<Buffer> memory_;
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> make_thread_communicators(const RankMap& map,
                                                                     const ThreadCommunicatorOptions& options) {
  const auto mailboxes = std::make_shared<Mailboxes>();
  std::vector<std::unique_ptr<Communicator>> communicators(map.ranks());
  for (int node = 0; node < map.nodes(); ++node) {
    const SharedWindow::Layout layout = WindowCommunicator::window_layout(map, node, options.area_bytes);
    const auto memory = std::make_shared<Buffer>(SharedWindow::bytes_of(layout));
    int place = 0;
    for (int rank : map.ranks_of(node)) {
      std::unique_ptr<NodeLink> link;
      if (map.nodes() > 1 && place == 0) link = std::make_unique<MailboxLink>(mailboxes, node, options.wait);
      auto window = std::make_unique<SharedWindow>(memory->data(), layout, place++, options.wait);
      communicators[rank] = std::make_unique<ThreadCommunicator>(map, rank, std::move(window), std::move(link), memory);
    }
  }
  return communicators;
}

RankMap one_node(const std::vector<int>& slices_of_rank) {
  RankMap map;
  const int total = std::accumulate(slices_of_rank.begin(), slices_of_rank.end(), 0);
  int first = 0;
  for (int count : slices_of_rank) {
    map.runs.push_back({first, count, total});
    map.node_of_rank.push_back(0);
    first += count;
  }
  return map;
}

}  // namespace octet
