// Drain: where rank 0 waits for the end of its work, whatever brings it: a signal that means drain, somebody's request,
// the end of the job's time, or the failure of the workers.
#pragma once

#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace octet {

// Why the work ends.
struct DrainOrder {
  std::string reason;    // "SIGUSR1", for the log
  bool hasty = false;    // mpirun is dying and kills its ranks about two seconds after its first word
  absl::Status failure;  // not OK: the workers are dead

  // What of `patience` there is.
  absl::Duration time_left(absl::Duration patience) const;
};

// One at a time in a process.
class Drain {
 public:
  Drain();
  ~Drain();
  Drain(const Drain&) = delete;

  // From now on SIGTERM, SIGUSR1 and the first SIGINT mean drain, and so does a SIGCONT whose sender is our parent and
  // a launcher of Open MPI: a dying mpirun sends it first. Any other SIGCONT is a resume. Until now these signals did
  // what they do by default, and after this object's end they do so again.
  void catch_signals();

  // Any thread, any number of times: the first one is the order.
  void request(const std::string& reason);
  void fail(const absl::Status& cause);

  // The first cause of fail(), even after an order to drain; OK before any. Any thread.
  absl::Status failure() const;

  // Waits for the order; at `latest` gives it. When mpirun is dying, waits a moment longer for what it dies of: if that
  // is a rank, the order is its failure.
  DrainOrder wait(absl::Time latest = absl::InfiniteFuture());

 private:
  void give(DrainOrder order);

  mutable std::mutex mutex_;
  bool ordered_ = false;
  DrainOrder order_;
  absl::Time may_fail_until_ = absl::InfinitePast();
  bool catching_ = false;
};

// When the batch system will end this job, from SLURM_JOB_END_TIME; never when that says nothing. `variable` is
// getenv() or a test's.
absl::Time job_end(const char* (*variable)(const char* name));
absl::Time job_end();
// The batch system's name of this job, from SLURM_JOB_ID; empty without one.
std::string job_id();

}  // namespace octet
