#include "tests/process.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

namespace octet {
namespace {

std::string contents(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

std::vector<char*> pointers(const std::vector<std::string>& strings) {
  std::vector<char*> result;
  for (const std::string& text : strings) result.push_back(const_cast<char*>(text.c_str()));
  result.push_back(nullptr);
  return result;
}

struct Stat {
  char state = 0;
  pid_t parent = 0;
};

// Of /proc/PID; zeros when there is no such process.
Stat stat_of(const std::filesystem::path& process) {
  // "PID (NAME) STATE PPID ...": the name may hold anything but ends at the last parenthesis.
  const std::string text = contents(process / "stat");
  std::istringstream fields(text.substr(std::min(text.rfind(')') + 1, text.size())));
  Stat stat;
  fields >> stat.state >> stat.parent;
  return stat;
}

}  // namespace

Process::Process(const std::vector<std::string>& argv, const Options& options) {
  static std::atomic<int> counter{0};
  const std::string base =
      testing::TempDir() + "octet_process_" + std::to_string(getpid()) + "_" + std::to_string(counter++);
  out_path_ = base + ".out";
  err_path_ = base + ".err";
  const int out = open(out_path_.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
  const int err = open(err_path_.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
  const int in = open("/dev/null", O_RDONLY | O_CLOEXEC);
  std::vector<char*> arguments = pointers(argv);
  pid_ = fork();
  if (pid_ == 0) {
    setpgid(0, 0);
    dup2(in, STDIN_FILENO);
    dup2(out, STDOUT_FILENO);
    dup2(err, STDERR_FILENO);
    for (const auto& [name, value] : options.environment) setenv(name.c_str(), value.c_str(), 1);
    if (!options.directory.empty() && chdir(options.directory.c_str()) != 0) _exit(126);
    execvp(arguments[0], arguments.data());
    _exit(127);
  }
  close(in);
  close(out);
  close(err);
}

Process::~Process() {
  // mpirun removes its shared memory when it may end in order.
  if (running()) {
    signal(SIGTERM);
    wait(std::chrono::seconds(5));
  }
  kill(-pid_, SIGKILL);
  if (status_ < 0) waitpid(pid_, nullptr, 0);
  std::error_code ignored;
  std::filesystem::remove(out_path_, ignored);
  std::filesystem::remove(err_path_, ignored);
}

bool Process::running() { return status_ < 0 && wait(std::chrono::seconds(0)) < 0; }

int Process::wait(std::chrono::seconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (status_ < 0) {
    int status = 0;
    if (waitpid(pid_, &status, WNOHANG) == pid_) {
      status_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    } else if (std::chrono::steady_clock::now() >= deadline) {
      return -1;
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }
  return status_;
}

std::vector<pid_t> Process::children() const {
  std::vector<pid_t> result;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    if (stat_of(entry.path()).parent == pid_) result.push_back(std::stoi(entry.path().filename()));
  }
  return result;
}

void Process::signal(int number) { kill(pid_, number); }
std::string Process::out() const { return contents(out_path_); }
std::string Process::err() const { return contents(err_path_); }

Finished run_command(const std::vector<std::string>& argv, const Process::Options& options,
                     std::chrono::seconds limit) {
  Process process(argv, options);
  const int status = process.wait(limit);
  return {status, process.out(), process.err()};
}

std::vector<std::string> mpirun(int ranks, const std::vector<std::string>& command) {
  std::vector<std::string> argv = {"mpirun", "-np", std::to_string(ranks), "--bind-to", "none", "--oversubscribe"};
  argv.insert(argv.end(), command.begin(), command.end());
  return argv;
}

Process::Options mpirun_environment() {
  Process::Options options;
  if (geteuid() == 0) {
    options.environment = {{"OMPI_ALLOW_RUN_AS_ROOT", "1"}, {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"}};
  }
  return options;
}

bool alive(pid_t pid) {
  const char state = stat_of("/proc/" + std::to_string(pid)).state;
  return state != 0 && state != 'Z' && state != 'X';
}

bool wait_for_file(const std::string& path, Process& process, std::chrono::seconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (!std::filesystem::exists(path)) {
    if (!process.running() || std::chrono::steady_clock::now() >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  return true;
}

}  // namespace octet
