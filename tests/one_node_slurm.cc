#include "tests/one_node_slurm.h"

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace octet {
namespace {

using std::chrono::seconds;

// cred_expire is also how long a job that is queued again must wait. A node may have fewer CPUs than it says.
constexpr char kConfiguration[] = R"(ClusterName=octet
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$DIR/munge.socket,cred_expire=5
SlurmctldPort=$CONTROLLER_PORT
SlurmdPort=$NODE_PORT
TmpFS=$DIR
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MailProg=/bin/true
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=8
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 State=UP
PartitionName=high Nodes=ALL PriorityTier=2 State=UP
)";

std::string new_directory() {
  // Sockets are in it, whose paths must be short.
  std::string path = "/tmp/octet_slurm_XXXXXX";
  if (mkdtemp(path.data()) == nullptr) return "";
  chmod(path.c_str(), 0755);
  for (const char* name : {"/state", "/spool"}) std::filesystem::create_directory(path + name);
  return path;
}

int free_port() {
  const int probe = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = {.sin_family = AF_INET, .sin_port = 0, .sin_addr = {htonl(INADDR_LOOPBACK)}, .sin_zero = {}};
  socklen_t size = sizeof address;
  bind(probe, reinterpret_cast<const sockaddr*>(&address), size);
  getsockname(probe, reinterpret_cast<sockaddr*>(&address), &size);
  close(probe);
  return ntohs(address.sin_port);
}

// Slurm knows machines by the first part of their names.
std::string host() {
  char name[256] = {};
  gethostname(name, sizeof name - 1);
  return std::vector<std::string>(absl::StrSplit(name, '.'))[0];
}

void write_configuration(const std::string& directory) {
  std::ofstream(directory + "/slurm.conf")
      << absl::StrReplaceAll(kConfiguration, {{"$HOST", host()},
                                              {"$DIR", directory},
                                              {"$CONTROLLER_PORT", absl::StrCat(free_port())},
                                              {"$NODE_PORT", absl::StrCat(free_port())}});
  // Named, slurmd need not find out which cgroups there are: it uses none, and containers may have none.
  std::ofstream(directory + "/cgroup.conf") << "CgroupPlugin=cgroup/v1\n";
}

void write_munge_key(const std::string& path) {
  std::ifstream random("/dev/urandom", std::ios::binary);
  std::string key(128, '\0');
  random.read(key.data(), static_cast<std::streamsize>(key.size()));
  std::ofstream(path, std::ios::binary) << key;
  chmod(path.c_str(), 0400);
}

}  // namespace

std::string OneNodeSlurm::missing() {
  if (geteuid() != 0) return "only root can start a Slurm of its own";
  for (const char* program : {"munged", "slurmctld", "slurmd", "sbatch"}) {
    if (run_command({"sh", "-c", absl::StrCat("command -v ", program)}).status != 0) {
      return absl::StrCat("there is no ", program, " (Debian package slurm-wlm)");
    }
  }
  return "";
}

OneNodeSlurm::OneNodeSlurm() : directory_(new_directory()) {
  write_configuration(directory_);
  write_munge_key(path("munge.key"));
  const Process::Options options{.environment = {{"SLURM_CONF", path("slurm.conf")}}, .directory = directory_};
  munged_ = std::make_unique<Process>(
      std::vector<std::string>{"munged", "--foreground", "--force", "--socket=" + path("munge.socket"),
                               "--key-file=" + path("munge.key"), "--pid-file=" + path("munged.pid"),
                               "--log-file=" + path("munged.log"), "--seed-file=" + path("munged.seed")},
      options);
  ready_ = wait_for_file(path("munge.socket"), *munged_, seconds(30));
  EXPECT_TRUE(ready_) << munged_->err();
  slurmctld_ = std::make_unique<Process>(std::vector<std::string>{"slurmctld", "-D"}, options);
  slurmd_ = std::make_unique<Process>(std::vector<std::string>{"slurmd", "-D"}, options);
  const auto idle = [&] { return run({"sinfo", "-h", "-p", "low", "-o", "%T"}).out == "idle\n"; };
  const auto ended = [&] { return !slurmctld_->running() || !slurmd_->running(); };
  ready_ = ready_ && wait_until([&] { return ended() || idle(); }, seconds(60)) && !ended();
  EXPECT_TRUE(ready_) << std::ifstream(path("slurmctld.log")).rdbuf() << std::ifstream(path("slurmd.log")).rdbuf();
}

OneNodeSlurm::~OneNodeSlurm() {
  run({"scancel", "--user=root", "--quiet"});
  wait_until_idle(seconds(20));
  for (std::unique_ptr<Process>* daemon : {&slurmd_, &slurmctld_, &munged_}) {
    if (*daemon != nullptr) (*daemon)->signal(SIGKILL);  // they would take their time, to save what nobody wants
    daemon->reset();
  }
  for (pid_t process : processes()) kill(process, SIGKILL);
  std::error_code ignored;
  std::filesystem::remove_all(directory_, ignored);
}

// Slurm makes its steps children of init; what they have of us is their environment.
std::vector<pid_t> OneNodeSlurm::processes() const {
  std::vector<pid_t> result;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    std::ostringstream environment;
    environment << std::ifstream(entry.path() / "environ", std::ios::binary).rdbuf();
    if (absl::StrContains(environment.str(), path("slurm.conf"))) result.push_back(std::stoi(entry.path().filename()));
  }
  return result;
}

Finished OneNodeSlurm::run(const std::vector<std::string>& argv, const std::map<std::string, std::string>& more) const {
  Process::Options options = mpirun_environment();
  options.directory = directory_;
  options.environment.insert(more.begin(), more.end());
  options.environment["SLURM_CONF"] = path("slurm.conf");
  return run_command(argv, options);
}

std::string OneNodeSlurm::submit(const std::vector<std::string>& arguments,
                                 const std::map<std::string, std::string>& more) {
  std::vector<std::string> argv = {"sbatch", "--parsable"};
  argv.insert(argv.end(), arguments.begin(), arguments.end());
  const Finished submitted = run(argv, more);
  EXPECT_EQ(submitted.status, 0) << submitted.err;
  return std::string(absl::StripSuffix(submitted.out, "\n"));
}

std::string OneNodeSlurm::field(const std::string& job, const std::string& name) const {
  const Finished shown = run({"scontrol", "--oneliner", "show", "job", job});
  for (const std::string& word : std::vector<std::string>(absl::StrSplit(shown.out, ' '))) {
    if (absl::StartsWith(word, name + "=")) return word.substr(name.size() + 1);
  }
  return "";
}

bool OneNodeSlurm::wait_for(const std::string& job, const std::string& name, const std::string& value,
                            seconds limit) const {
  return wait_until([&] { return field(job, name) == value; }, limit);
}

bool OneNodeSlurm::wait_until_idle(seconds limit) const {
  return wait_until([&] { return run({"squeue", "-h"}).out.empty(); }, limit);
}

}  // namespace octet
