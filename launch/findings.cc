#include "launch/findings.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "launch/gpu_binding.h"
#include "worker/memory_plan.h"

namespace octet {
namespace {

using Level = FindingLevel;

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kFewOpenFiles = 4096;              // a thousand clients, their sockets and the model's files
constexpr int64_t kLittleLockedMemory = 64 * kMiB;   // what networks and GPUs pin
constexpr double kSlowRank = 0.6;                    // of the median
constexpr double kSlowRead = 0.2e9;                  // bytes per second of a node
constexpr double kSlowAllReduce = 1e-3;              // seconds, of a small message
constexpr int64_t kIdleGpuBytes = int64_t{2} << 30;  // what drivers hold of a GPU that does nothing
constexpr double kClocksApart = 1.0;                 // seconds

// What one rank has to say about one check.
struct Verdict {
  Level level = Level::kOk;
  std::string message, remedy;
  bool operator<(const Verdict& other) const {
    return std::tie(level, message, remedy) < std::tie(other.level, other.message, other.remedy);
  }
};

// Collects verdicts of a check; equal ones of several ranks become one finding.
class Check {
 public:
  Check(std::string name, std::vector<Finding>* findings) : name_(std::move(name)), findings_(findings) {}
  ~Check() {
    for (const auto& [first, verdict] : order_) {
      findings_->push_back({verdict.level, name_, ranks_[verdict], verdict.message, verdict.remedy});
    }
  }
  void add(int rank, const Verdict& verdict) {
    std::vector<int>& ranks = ranks_[verdict];
    if (ranks.empty()) order_.emplace_back(rank, verdict);
    ranks.push_back(rank);
  }
  void add(const std::vector<RankFacts>& ranks, const Verdict& verdict) {
    for (const RankFacts& rank : ranks) add(rank.rank, verdict);
  }

 private:
  const std::string name_;
  std::vector<Finding>* const findings_;
  std::vector<std::pair<int, Verdict>> order_;
  std::map<Verdict, std::vector<int>> ranks_;
};

std::map<int, std::vector<const RankFacts*>> by_node(const JobFacts& job) {
  std::map<int, std::vector<const RankFacts*>> nodes;
  for (const RankFacts& rank : job.ranks) nodes[rank.node].push_back(&rank);
  return nodes;
}

std::string variable(const RankFacts& rank, const std::string& name) {
  const auto found = rank.environment.find(name);
  return found == rank.environment.end() ? "" : found->second;
}

std::string plural(size_t count, const char* noun) { return absl::StrCat(count, " ", noun, count == 1 ? "" : "s"); }

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

// "node1 (ranks 0-3), node2 (ranks 4-7)", as far as a line goes.
std::string name_nodes(const JobFacts& job) {
  constexpr size_t kMost = 8;
  std::vector<std::string> names;
  for (const auto& [number, node] : by_node(job)) {
    std::vector<int> ranks;
    for (const RankFacts* rank : node) ranks.push_back(rank->rank);
    if (names.size() < kMost) names.push_back(absl::StrCat(node[0]->host, " (", name_ranks(ranks), ")"));
  }
  return absl::StrCat(absl::StrJoin(names, ", "), by_node(job).size() > kMost ? ", ..." : "");
}

void judge_launch(const JobFacts& job, std::vector<Finding>* findings) {
  Check check("launch", findings);
  const size_t nodes = by_node(job).size();
  std::string message = absl::StrCat(plural(job.ranks.size(), "rank"), " on ", plural(nodes, "node"));
  if (nodes > 1) absl::StrAppend(&message, ": ", name_nodes(job));
  for (const char* name : {"SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_JOB_NUM_NODES", "SLURM_CPUS_PER_TASK"}) {
    if (const std::string value = variable(job.ranks[0], name); !value.empty()) {
      absl::StrAppend(&message, ", ", name, "=", value);
    }
  }
  if (job.ranks.size() > 1) {
    absl::StrAppend(&message, "; they talk through a shared-memory window",
                    nodes == 1 ? "" : " on a node, MPI between nodes");
  }
  check.add(job.ranks, {Level::kOk, message, ""});
}

void judge_versions(const JobFacts& job, std::vector<Finding>* findings) {
  Check check("versions", findings);
  for (const RankFacts& rank : job.ranks) {
    const std::string message = absl::StrJoin(rank.versions, ", ", absl::PairFormatter(" "));
    const auto differs = [&](const char* what) {
      const auto version = [&](const RankFacts& facts) {
        const auto found = facts.versions.find(what);
        return found == facts.versions.end() ? std::string() : found->second;
      };
      return version(rank) != version(job.ranks[0]);
    };
    if (differs("octet") || differs("Open MPI")) {
      check.add(rank.rank, {Level::kFailure, absl::StrCat(message, ": not what rank 0 runs"),
                            "start the same binary and the same Open MPI on every node"});
    } else {
      check.add(rank.rank, {Level::kOk, message, ""});
    }
  }
}

bool share_a_cpu(const RankFacts& a, const RankFacts& b) {
  const std::set<int> cpus(a.cpus.begin(), a.cpus.end());
  return std::any_of(b.cpus.begin(), b.cpus.end(), [&](int cpu) { return cpus.contains(cpu); });
}

Verdict judge_binding_of(const RankFacts& rank, const std::vector<const RankFacts*>& node) {
  const std::string cores = plural(static_cast<size_t>(rank.own_cores), "core");
  std::vector<int> overlapping;  // this rank among them
  bool same = true;
  for (const RankFacts* other : node) {
    if (share_a_cpu(rank, *other)) overlapping.push_back(other->rank);
    same &= other->cpus == rank.cpus;
  }
  const bool alone = overlapping.size() == 1;
  if (!alone && !same) {
    return {Level::kWarning, absl::StrCat("some CPUs, but not all, are common to ", name_ranks(overlapping)),
            "mpirun --bind-to none, or --map-by ppr:N:node:PE=CORES; srun --cpu-bind=none, or --cpus-per-task"};
  }
  if (rank.node_cores < static_cast<int>(node.size())) {
    return {Level::kWarning,
            absl::StrFormat("%d ranks share %d cores: those that wait sleep, and steps are slower", node.size(),
                            rank.node_cores),
            "fewer ranks on this node, or more cores for the job"};
  }
  const bool lone_core = rank.cpus.size() == 1 && rank.online_cpus > static_cast<int>(node.size());
  if (lone_core && !variable(rank, "OMPI_COMM_WORLD_SIZE").empty() && variable(rank, "SLURM_JOB_ID").empty()) {
    return {Level::kWarning, absl::StrFormat("bound to 1 of the machine's %d CPUs", rank.online_cpus),
            "mpirun binds a rank to one core unless told otherwise: --bind-to none"};
  }
  if (node.size() == 1) return {Level::kOk, cores, ""};
  return {Level::kOk, absl::StrCat(cores, alone ? " each, no other rank's" : " each, not bound"), ""};
}

void judge_binding(const JobFacts& job, std::vector<Finding>* findings) {
  Check check("binding", findings);
  for (const auto& [number, node] : by_node(job)) {
    for (const RankFacts* rank : node) check.add(rank->rank, judge_binding_of(*rank, node));
  }
}

Verdict judge_numa_of(const RankFacts& rank, size_t ranks_on_node) {
  size_t touched = 0;
  for (const std::vector<int>& node : rank.numa_nodes) {
    touched += std::any_of(node.begin(), node.end(), [&](int cpu) {
      return std::find(rank.cpus.begin(), rank.cpus.end(), cpu) != rank.cpus.end();
    });
  }
  const std::string machine = plural(std::max<size_t>(rank.numa_nodes.size(), 1), "NUMA node");
  if (touched > 1) {
    return {
        Level::kWarning,
        absl::StrFormat("%s; threads may run on %d of them, away from the weights that they read", machine, touched),
        absl::StrCat("a rank for each NUMA node or more (", plural(ranks_on_node, "rank"),
                     " here), and mpirun --map-by numa --bind-to numa, or srun --cpu-bind=ldoms")};
  }
  return {Level::kOk, machine, ""};
}

void judge_numa(const JobFacts& job, std::vector<Finding>* findings) {
  Check check("NUMA", findings);
  for (const auto& [number, node] : by_node(job)) {
    for (const RankFacts* rank : node) check.add(rank->rank, judge_numa_of(*rank, node.size()));
  }
}

GpuView view_of(const RankFacts& rank) {
  const std::vector<GpuFacts>& gpus = rank.gpus.gpus;
  if (gpus.empty()) return {};
  const std::vector<std::string> named = absl::StrSplit(variable(rank, "CUDA_VISIBLE_DEVICES"), ',', absl::SkipEmpty());
  const int present = static_cast<int>(gpus.size());
  return {.visible = named.size() == 1 ? 1 : present, .present = present, .uuid = gpus[0].uuid};
}

std::optional<HiddenPeers> find_hidden_peers_of(const RankFacts& rank, const std::vector<const RankFacts*>& node) {
  std::vector<GpuView> views;
  for (const RankFacts* other : node) views.push_back(view_of(*other));
  return find_hidden_peers(view_of(rank), views, [&](const char* name) { return variable(rank, name); });
}

Verdict judge_gpus_of(const RankFacts& rank, const std::vector<const RankFacts*>& node) {
  if (!rank.nvidia_driver) return {Level::kOk, "no NVIDIA driver: CPU ranks only", ""};
  if (!rank.gpu_error.empty()) {
    return {Level::kWarning, absl::StrCat("the NVIDIA driver does not answer: ", rank.gpu_error),
            "nvidia-smi on that node says more; a reboot or a reset of the GPU may be needed"};
  }
  const std::vector<GpuFacts>& gpus = rank.gpus.gpus;
  if (gpus.empty()) {
    return {Level::kWarning, absl::StrCat("driver ", rank.gpus.driver, ", but no GPU is lent to this job"),
            "ask for them: srun --gpus-per-node=8, or --gres=gpu:8"};
  }
  if (const std::optional<HiddenPeers> hidden = find_hidden_peers_of(rank, node)) {
    return {Level::kWarning, hidden->message, hidden->remedy};
  }
  std::set<std::string> kinds;
  for (const GpuFacts& gpu : gpus) kinds.insert(gpu.name);
  const std::string message = absl::StrFormat("driver %s, %d x %s, %s each", rank.gpus.driver, gpus.size(),
                                              absl::StrJoin(kinds, " and "), human_bytes(gpus[0].memory_bytes));
  if (gpus.size() < node.size()) {
    return {Level::kWarning, absl::StrCat(message, ": fewer than the ", node.size(), " ranks of the node"),
            "one GPU for each rank: fewer ranks, or srun --gpus-per-node"};
  }
  for (size_t i = 0; i < gpus.size(); ++i) {
    const int64_t used = gpus[i].memory_bytes - gpus[i].free_bytes;
    if (used <= kIdleGpuBytes) continue;
    return {Level::kWarning, absl::StrCat(message, "; ", human_bytes(used), " of GPU ", i, " are taken already"),
            "nvidia-smi shows by whom: what a job before this one left behind has to go first"};
  }
  if (kinds.size() > 1) return {Level::kWarning, message, "the slowest sets the pace: use GPUs of one kind"};
  if (!rank.gpus.pairs_without_peer_access.empty()) {
    const auto [i, j] = rank.gpus.pairs_without_peer_access[0];
    return {Level::kWarning,
            absl::StrCat(message, "; ", plural(rank.gpus.pairs_without_peer_access.size(), "pair"),
                         " cannot read each other's memory, ", i, " and ", j, " first"),
            "nvidia-smi topo -p2p r shows them; sums between them go through the host"};
  }
  return {Level::kOk, absl::StrCat(message, ", all peers of one another"), ""};
}

void judge_gpus(const JobFacts& job, std::vector<Finding>* findings) {
  Check check("GPUs", findings);
  for (const auto& [number, node] : by_node(job)) {
    for (const RankFacts* rank : node) check.add(rank->rank, judge_gpus_of(*rank, node));
  }
}

void judge_shared_memory(const JobFacts& job, std::vector<Finding>* findings) {
  Check check("shared memory", findings);
  // The message says what to do.
  if (!job.communicator_error.empty()) return check.add(job.ranks, {Level::kFailure, job.communicator_error, ""});
  for (const auto& [number, node] : by_node(job)) {
    for (const RankFacts* rank : node) {
      // A rank alone on its node shares nothing.
      const bool enough = node.size() == 1 || rank->shm_free_bytes >= rank->shm_need_bytes;
      const std::string message =
          absl::StrFormat("/dev/shm has %s free, the window takes %s", human_bytes(rank->shm_free_bytes),
                          human_bytes(node.size() == 1 ? 0 : rank->shm_need_bytes));
      check.add(rank->rank, enough ? Verdict{Level::kOk, message, ""}
                                   : Verdict{Level::kFailure, message,
                                             "mount -o remount,size=1g /dev/shm; in a container, docker run "
                                             "--shm-size=1g; or remove what others left there"});
    }
  }
}

std::string limit_text(int64_t limit) { return limit < 0 ? "unlimited" : absl::StrCat(limit); }

void judge_limits(const JobFacts& job, std::vector<Finding>* findings) {
  Check check("limits", findings);
  const bool pins = by_node(job).size() > 1;
  for (const RankFacts& rank : job.ranks) {
    const std::string message = absl::StrCat("open files ", limit_text(rank.open_files), ", locked memory ",
                                             rank.locked_bytes < 0 ? "unlimited" : human_bytes(rank.locked_bytes));
    std::vector<std::string> remedies;
    if (rank.open_files >= 0 && rank.open_files < kFewOpenFiles) {
      remedies.push_back(absl::StrCat("ulimit -n ", 16 * kFewOpenFiles, " (each client takes a socket)"));
    }
    const bool gpus = rank.nvidia_driver && !rank.gpus.gpus.empty();
    if ((pins || gpus) && rank.locked_bytes >= 0 && rank.locked_bytes < kLittleLockedMemory) {
      remedies.push_back("ulimit -l unlimited (networks and GPUs pin memory; LimitMEMLOCK=infinity in slurmd's unit)");
    }
    check.add(rank.rank, {remedies.empty() ? Level::kOk : Level::kWarning, message, absl::StrJoin(remedies, "; ")});
  }
}

void judge_memory(const JobFacts& job, std::vector<Finding>* findings) {
  Check check("memory", findings);
  int64_t least = job.ranks[0].memory_bytes, most = least;
  for (const RankFacts& rank : job.ranks) {
    least = std::min(least, rank.memory_bytes);
    most = std::max(most, rank.memory_bytes);
  }
  const std::string amount =
      least == most ? human_bytes(least) : absl::StrCat(human_bytes(least), " to ", human_bytes(most));
  const std::string message = absl::StrCat(amount, " available to each rank, within its cgroups' limits");
  if (!job.plan_error.empty()) {
    return check.add(job.ranks, {Level::kFailure, job.plan_error,
                                 absl::StrCat("octet plan --model ", job.model, " --cpu --ranks ", job.ranks.size(),
                                              " names what would fit")});
  }
  check.add(
      job.ranks,
      {Level::kOk,
       absl::StrCat(message, job.model.empty() || !job.ranks[0].model.error.empty() ? "" : "; the model fits"), ""});
}

void judge_bandwidth(const JobFacts& job, std::vector<Finding>* findings) {
  Check check("memory speed", findings);
  std::vector<double> speeds;
  for (const RankFacts& rank : job.ranks) speeds.push_back(rank.read_bytes_per_second);
  const double middle = median(speeds);
  const auto [least, most] = std::minmax_element(speeds.begin(), speeds.end());
  const std::string all =
      *most < 1.05 * *least
          ? absl::StrFormat("%.1f GB/s read by each rank, all at once", *least / 1e9)
          : absl::StrFormat("%.1f to %.1f GB/s read by each rank, all at once", *least / 1e9, *most / 1e9);
  for (const RankFacts& rank : job.ranks) {
    if (rank.read_bytes_per_second >= kSlowRank * middle) {
      check.add(rank.rank, {Level::kOk, all, ""});
      continue;
    }
    check.add(rank.rank, {Level::kWarning,
                          absl::StrFormat("%.1f GB/s, where half of the ranks read %.1f and more; all wait for it",
                                          rank.read_bytes_per_second / 1e9, middle / 1e9),
                          "look for other work on that node, its binding and its memory channels"});
  }
}

std::string remedy_for_slow_sums(const JobFacts& job) {
  const bool sleeps =
      std::any_of(job.ranks.begin(), job.ranks.end(), [](const RankFacts& rank) { return !rank.core_for_each_thread; });
  if (sleeps) return "a core for every thread, so that waiting ranks need not sleep";
  if (by_node(job).size() == 1)
    return "look for other work on these cores: a rank that waits for its turn holds up all";
  return "the network between the nodes is slow: is the fast one used? (OMPI_MCA_btl, UCX_NET_DEVICES)";
}

void judge_all_reduce(const JobFacts& job, std::vector<Finding>* findings) {
  if (job.ranks.size() == 1) return;
  Check check("all-reduce", findings);
  for (const AllReduceFacts& row : job.all_reduces) {
    const std::string message =
        absl::StrFormat("%s in %.1f us, p99 %.1f us, %.2f GB/s", human_bytes(row.bytes), 1e6 * row.p50_seconds,
                        1e6 * row.p99_seconds, static_cast<double>(row.bytes) / row.p50_seconds / 1e9);
    // The smallest is all latency, whatever the machine.
    const bool slow = &row == &job.all_reduces[0] && row.p50_seconds > kSlowAllReduce;
    check.add(job.ranks,
              slow ? Verdict{Level::kWarning, message, remedy_for_slow_sums(job)} : Verdict{Level::kOk, message, ""});
  }
}

Verdict judge_model_of(const RankFacts& rank, const RankFacts& first, double node_speed) {
  const ModelFacts& model = rank.model;
  if (!model.error.empty()) {
    return {Level::kFailure, model.error, "the same directory must be there, whole, on every node"};
  }
  if (model.digest != first.model.digest) {
    return {Level::kFailure,
            absl::StrCat("other files than rank 0 has: digest ", model.digest, " instead of ", first.model.digest),
            "copy the model again, or serve it from one shared file system"};
  }
  const std::string message =
      absl::StrFormat("%s, digest %s, %s on %s", human_bytes(model.weight_bytes), model.digest,
                      model.read_bytes == 0 ? "nothing to read" : absl::StrFormat("%.2f GB/s a node", node_speed / 1e9),
                      model.filesystem);
  if (model.read_bytes > 64 * kMiB && node_speed < kSlowRead) {
    return {Level::kWarning,
            absl::StrFormat("%s: loading takes about %.0f s", message,
                            static_cast<double>(model.weight_bytes) / node_speed),
            "copy the model to a local disk, or stripe it wider"};
  }
  return {Level::kOk, message, ""};
}

void judge_model(const JobFacts& job, std::vector<Finding>* findings) {
  if (job.model.empty()) return;
  Check check("model files", findings);
  for (const auto& [number, node] : by_node(job)) {
    double speed = 0;
    for (const RankFacts* rank : node) {
      if (rank->model.read_seconds > 0) speed += static_cast<double>(rank->model.read_bytes) / rank->model.read_seconds;
    }
    for (const RankFacts* rank : node) check.add(rank->rank, judge_model_of(*rank, job.ranks[0], speed));
  }
}

void judge_ports(const JobFacts& job, std::vector<Finding>* findings) {
  Check check("ports", findings);
  if (!job.port_error.empty()) {
    return check.add(0, {Level::kFailure, job.port_error, "rank 0 must be able to listen on this machine"});
  }
  if (!job.port_in_use.empty()) {
    return check.add(0, {Level::kWarning, absl::StrCat(job.port_in_use, " is taken by another process"),
                         "serve --address 127.0.0.1:0 --address-file FILE takes a free one"});
  }
  check.add(0,
            {Level::kOk, absl::StrCat("serve's default port is free; ephemeral ports are ", job.ephemeral_ports), ""});
}

void judge_clocks(const JobFacts& job, std::vector<Finding>* findings) {
  if (by_node(job).size() < 2) return;
  Check check("clocks", findings);
  for (const RankFacts& rank : job.ranks) {
    const double apart = rank.clock_seconds - job.ranks[0].clock_seconds;
    if (std::abs(apart) < kClocksApart) {
      check.add(rank.rank, {Level::kOk, "within a second of rank 0's", ""});
    } else {
      check.add(rank.rank, {Level::kWarning, absl::StrFormat("%.1f s away from rank 0's", apart),
                            "logs of several nodes will not line up: run chrony or ntpd"});
    }
  }
}

const char* name_of(Level level) {
  switch (level) {
    case Level::kOk:
      return "ok";
    case Level::kWarning:
      return "warning";
    case Level::kFailure:
      return "failure";
  }
  return "?";
}

}  // namespace

std::vector<Finding> judge(const JobFacts& job) {
  std::vector<Finding> findings;
  for (const auto check :
       {judge_launch, judge_versions, judge_binding, judge_numa, judge_gpus, judge_shared_memory, judge_limits,
        judge_memory, judge_bandwidth, judge_all_reduce, judge_model, judge_ports, judge_clocks}) {
    check(job, &findings);
  }
  return findings;
}

bool any_failure(const std::vector<Finding>& findings) {
  return std::any_of(findings.begin(), findings.end(),
                     [](const Finding& finding) { return finding.level == Level::kFailure; });
}

std::string name_ranks(const std::vector<int>& ranks) {
  std::vector<std::string> runs;
  for (size_t first = 0, last = 0; first < ranks.size(); first = last + 1) {
    last = first;
    while (last + 1 < ranks.size() && ranks[last + 1] == ranks[last] + 1) ++last;
    runs.push_back(first == last ? absl::StrCat(ranks[first]) : absl::StrCat(ranks[first], "-", ranks[last]));
  }
  return absl::StrCat(ranks.size() == 1 ? "rank " : "ranks ", absl::StrJoin(runs, ", "));
}

std::string to_text(const std::vector<Finding>& findings) {
  size_t widest = 0;
  for (const Finding& finding : findings) widest = std::max(widest, name_ranks(finding.ranks).size());
  std::string text;
  for (const Finding& finding : findings) {
    absl::StrAppendFormat(&text, "%-8s %-14s %-*s  %s\n", name_of(finding.level), finding.check,
                          static_cast<int>(widest), name_ranks(finding.ranks), finding.message);
    if (!finding.remedy.empty()) {
      absl::StrAppendFormat(&text, "%-8s %-14s %-*s  -> %s\n", "", "", static_cast<int>(widest), "", finding.remedy);
    }
  }
  return text;
}

nlohmann::ordered_json to_json(const std::vector<Finding>& findings) {
  nlohmann::ordered_json json = nlohmann::ordered_json::array();
  for (const Finding& finding : findings) {
    json.push_back({{"level", name_of(finding.level)},
                    {"check", finding.check},
                    {"ranks", finding.ranks},
                    {"message", finding.message},
                    {"remedy", finding.remedy}});
  }
  return json;
}

}  // namespace octet
