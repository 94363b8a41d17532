// OneNodeSlurm: a real Slurm whose only node is this machine, for end-to-end tests: munged, slurmctld and slurmd as
// root, on loopback, with ports, a key and a folder of its own. Invariant: after its end no process that it began is
// left.
#pragma once

#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/process.h"

namespace octet {

// Whether the condition comes true within the limit.
template <typename Condition>
bool wait_until(Condition condition, std::chrono::seconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    if (std::chrono::steady_clock::now() >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  return true;
}

class OneNodeSlurm {
 public:
  // What this machine lacks for it, as a sentence; empty when nothing.
  static std::string missing();

  // Starts it. Jobs wait about 6 s in the queue when they are queued again, instead of Slurm's two minutes.
  OneNodeSlurm();
  // Cancels what is left.
  ~OneNodeSlurm();
  OneNodeSlurm(const OneNodeSlurm&) = delete;

  // Whether jobs can run; otherwise an expectation has failed with what the daemons said.
  bool ready() const { return ready_; }
  // The folder, where jobs are submitted.
  const std::string& directory() const { return directory_; }
  std::string path(const std::string& name) const { return directory_ + "/" + name; }

  // Any command with this Slurm, and more variables.
  Finished run(const std::vector<std::string>& argv, const std::map<std::string, std::string>& more = {}) const;
  // sbatch with these arguments; the job's number, or empty after a failed expectation.
  std::string submit(const std::vector<std::string>& arguments, const std::map<std::string, std::string>& more = {});
  // A field as scontrol show job has it ("JobState", "Comment"); empty without such a job. Of an array: JOB_TASK.
  std::string field(const std::string& job, const std::string& name) const;
  // Whether the field has this value within the limit.
  bool wait_for(const std::string& job, const std::string& name, const std::string& value,
                std::chrono::seconds limit) const;
  // Whether no job runs or waits within the limit.
  bool wait_until_idle(std::chrono::seconds limit) const;

 private:
  std::vector<pid_t> processes() const;

  const std::string directory_;
  bool ready_ = false;
  std::unique_ptr<Process> munged_, slurmctld_, slurmd_;
};

}  // namespace octet
