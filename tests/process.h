// Process: runs commands for end-to-end tests, with their output in files and a deadline so that nothing can hang a
// test.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <map>
#include <string>
#include <vector>

namespace octet {

class Process {
 public:
  struct Options {
    std::map<std::string, std::string> environment;  // added to this process's own
    std::string directory;                           // empty: this one's
  };
  // Starts argv[0] (looked up in PATH) in its own process group.
  explicit Process(const std::vector<std::string>& argv, const Options& options = {});
  // Asks it to end; after 5 s kills what is left of the group.
  ~Process();
  Process(const Process&) = delete;

  // The exit status (128 + signal when killed), or -1 when it still runs at the deadline.
  int wait(std::chrono::seconds limit);
  bool running();
  void signal(int number);  // to the process itself
  pid_t pid() const { return pid_; }
  std::vector<pid_t> children() const;

  std::string out() const;  // so far
  std::string err() const;

 private:
  pid_t pid_ = -1;
  int status_ = -1;
  std::string out_path_, err_path_;
};

struct Finished {
  int status = 0;
  std::string out, err;
};
// Runs a command to its end; -1 as status when it did not end within the limit.
Finished run_command(const std::vector<std::string>& argv, const Process::Options& options = {},
                     std::chrono::seconds limit = std::chrono::seconds(120));

// mpirun with what these tests need: as root, more ranks than cores, no binding. Then the command.
std::vector<std::string> mpirun(int ranks, const std::vector<std::string>& command);
Process::Options mpirun_environment();

// Whether a process runs; one that ended and was not waited for does not.
bool alive(pid_t pid);

// Waits until `path` exists; false at the deadline or when the process has ended.
bool wait_for_file(const std::string& path, Process& process, std::chrono::seconds limit);

}  // namespace octet
