#include "launch/bootstrap.h"

#include <mpi.h>
#include <sys/random.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <set>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "kernels/check.h"
#include "launch/machine.h"
#include "worker/collective/mpi_communicator.h"

namespace octet {
namespace {

const char* environment(const char* name) { return std::getenv(name); }

// Whether a launcher that Open MPI understands started this process.
bool launched() {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"}) {
    if (std::getenv(name) != nullptr) return true;
  }
  return false;
}

// An installation brings an Open MPI of its own, which has moved with it: a file names the variables and where they
// point from the installation's root. bin/mpirun reads the same file; srun starts us without it.
void use_installed_open_mpi() {
  std::error_code error;
  const auto root = std::filesystem::read_symlink("/proc/self/exe", error).parent_path().parent_path();
  std::ifstream lines(root / "share/octet/environment");
  for (std::string line; std::getline(lines, line);) {
    const std::pair<std::string, std::string> entry = absl::StrSplit(line, absl::MaxSplits('=', 1));
    setenv(entry.first.c_str(), (entry.second.empty() ? root : root / entry.second).c_str(), 1);
  }
}

// What Open MPI should do differently, unless the user has said something.
void set_open_mpi_defaults() {
  // That a plugin for some fast network misses the libraries of that network is no news.
  setenv("OMPI_MCA_mca_base_component_show_load_errors", "0", 0);
  // Containers forbid reading a peer's memory, and Open MPI says so again and again; what we send between ranks of one
  // machine is small.
  setenv("OMPI_MCA_btl_vader_single_copy_mechanism", "none", 0);
  // A process alone needs no daemon beside it.
  if (!launched()) setenv("OMPI_MCA_ess_singleton_isolated", "1", 0);
}

std::string random_secret() {
  std::string secret(32, '\0');
  OCTET_CHECK(getrandom(secret.data(), secret.size(), 0) == static_cast<ssize_t>(secret.size()), "getrandom failed");
  return secret;
}

}  // namespace

absl::Status check_launch(int size, const char* (*variable)(const char* name)) {
  if (size > 1) return absl::OkStatus();
  // mpirun's word comes first: `mpirun -np 1` in an allocation of many tasks is meant.
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"}) {
    const char* value = variable(name);
    int meant = 0;
    if (value == nullptr || !absl::SimpleAtoi(value, &meant)) continue;
    if (meant <= 1) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrCat(
        "this process is a single rank although ", name, " says ", meant,
        ": the ranks do not see one another. Start them with `srun --mpi=pmix octet serve ...` or `mpirun -np ", meant,
        " octet serve ...`; for a single rank, `mpirun -np 1` or `srun --mpi=pmix --ntasks 1`"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int>> parse_pretend_nodes(const std::string& text) {
  std::vector<int> ranks_of_node;
  for (absl::string_view part : absl::StrSplit(text, '+')) {
    int ranks = 0;
    if (!absl::SimpleAtoi(part, &ranks) || ranks < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("--pretend-nodes is numbers of ranks joined by '+', like 2+1; found \"", text, "\""));
    }
    ranks_of_node.push_back(ranks);
  }
  return ranks_of_node;
}

absl::StatusOr<std::unique_ptr<Bootstrap>> Bootstrap::start(const Options& options) {
  // Open MPI ends a process that srun started without PMIx with advice of its own: ours comes first.
  if (!launched()) {
    if (absl::Status status = check_launch(1, environment); !status.ok()) return status;
  }
  use_installed_open_mpi();
  set_open_mpi_defaults();
  int provided = 0;
  if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided) != MPI_SUCCESS) {
    return absl::UnavailableError("MPI_Init_thread failed; Open MPI's own message is above");
  }
  std::unique_ptr<Bootstrap> bootstrap(new Bootstrap);  // finalises MPI whatever comes next
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  MPI_Comm_rank(MPI_COMM_WORLD, &bootstrap->rank_);
  absl::Status status = check_launch(size, environment);
  if (status.ok() && provided < MPI_THREAD_SERIALIZED) {
    status = absl::FailedPreconditionError("this MPI library was built without threads (MPI_THREAD_SERIALIZED)");
  }
  if (status = bootstrap->agree(status); !status.ok()) return status;

  bootstrap->find_node();
  bootstrap->count_cores();
  if (status = bootstrap->agree(bootstrap->pretend(options.pretend_nodes)); !status.ok()) return status;
  bootstrap->job_secret_ = bootstrap->broadcast(bootstrap->rank_ == 0 ? random_secret() : "");
  return bootstrap;
}

Bootstrap::~Bootstrap() { MPI_Finalize(); }

void Bootstrap::find_node() {
  MPI_Comm node_comm;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &node_comm);
  MPI_Comm_rank(node_comm, &local_rank_);
  MPI_Comm_size(node_comm, &local_size_);
  int first = rank_;
  MPI_Bcast(&first, 1, MPI_INT, 0, node_comm);
  MPI_Comm_free(&node_comm);

  // A node is known by its first rank; nodes are numbered in the order of their first ranks.
  const std::vector<uint64_t> firsts = all_gather(static_cast<uint64_t>(first));
  const std::set<uint64_t> in_order(firsts.begin(), firsts.end());
  for (uint64_t f : firsts) {
    real_node_of_rank_.push_back(static_cast<int>(std::distance(in_order.begin(), in_order.find(f))));
  }
  node_of_rank_ = real_node_of_rank_;
}

absl::Status Bootstrap::pretend(const std::vector<int>& ranks_of_node) {
  if (ranks_of_node.empty()) return absl::OkStatus();
  std::vector<int> nodes;
  for (int ranks : ranks_of_node) nodes.insert(nodes.end(), ranks, nodes.empty() ? 0 : nodes.back() + 1);
  if (nodes.size() != node_of_rank_.size()) {
    return absl::InvalidArgumentError(absl::StrCat("--pretend-nodes ", absl::StrJoin(ranks_of_node, "+"), " is ",
                                                   nodes.size(), " ranks, but ", size(), " were started"));
  }
  for (int r = 1; r < size(); ++r) {
    if (nodes[r] == nodes[r - 1] && real_node_of_rank_[r] != real_node_of_rank_[r - 1]) {
      return absl::InvalidArgumentError(absl::StrCat("--pretend-nodes puts ranks ", r - 1, " and ", r,
                                                     " on one node, but they run on different machines"));
    }
  }
  node_of_rank_ = nodes;
  return absl::OkStatus();
}

std::vector<uint64_t> Bootstrap::on_my_node(const std::vector<uint64_t>& of_rank) const {
  std::vector<uint64_t> mine;
  for (int r = 0; r < size(); ++r) {
    if (real_node_of_rank_[r] == real_node_of_rank_[rank_]) mine.push_back(of_rank[r]);
  }
  return mine;
}

void Bootstrap::count_cores() {
  const std::vector<int> own = allowed_cpus();
  const std::vector<std::string> of_rank =
      all_gather(std::string_view(reinterpret_cast<const char*>(own.data()), own.size() * sizeof(int)));
  std::set<int> together;
  size_t counted = 0;
  for (int r = 0; r < size(); ++r) {
    if (real_node_of_rank_[r] != real_node_of_rank_[rank_]) continue;
    std::vector<int> cpus(of_rank[r].size() / sizeof(int));
    std::memcpy(cpus.data(), of_rank[r].data(), of_rank[r].size());
    counted += cpus.size();
    together.insert(cpus.begin(), cpus.end());
  }
  const int all = static_cast<int>(together.size());
  const std::vector<uint64_t> quotas = on_my_node(all_gather(static_cast<uint64_t>(cores_within_quota(all))));
  node_cores_ = static_cast<int>(*std::min_element(quotas.begin(), quotas.end()));
  const int equal_part = std::max(1, node_cores_ / local_size_);
  const bool disjoint = counted == together.size();
  own_cores_ = disjoint && node_cores_ == all ? static_cast<int>(own.size()) : equal_part;
}

absl::StatusOr<int64_t> Bootstrap::own_memory() {
  const absl::StatusOr<int64_t> available = available_memory();
  if (absl::Status status = agree(available.status()); !status.ok()) return status;
  const std::vector<uint64_t> seen = on_my_node(all_gather(static_cast<uint64_t>(*available)));
  return static_cast<int64_t>(*std::min_element(seen.begin(), seen.end())) / local_size_;
}

std::string Bootstrap::mpi_version() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  MPI_Get_library_version(text, &length);
  // "Open MPI v4.1.4, package: ..., ident: ..."
  const std::string version(text, text + (std::find(text, text + length, ',') - text));
  return absl::StrReplaceAll(version, {{"MPI v", "MPI "}});
}

bool Bootstrap::each_thread_has_a_core(int threads) {
  const std::vector<uint64_t> of_rank = on_my_node(all_gather(static_cast<uint64_t>(threads)));
  return std::accumulate(of_rank.begin(), of_rank.end(), uint64_t{0}) <= static_cast<uint64_t>(node_cores_);
}

absl::Status Bootstrap::agree(const absl::Status& mine) { return agree_over_mpi(mine); }

std::string Bootstrap::broadcast(std::string value) { return all_gather(rank_ == 0 ? value : "")[0]; }

std::vector<uint64_t> Bootstrap::all_gather(uint64_t mine) {
  std::vector<uint64_t> values;
  for (const std::string& bytes : all_gather_over_mpi({reinterpret_cast<const char*>(&mine), sizeof(mine)})) {
    std::memcpy(&values.emplace_back(), bytes.data(), sizeof(mine));
  }
  return values;
}

std::vector<std::string> Bootstrap::all_gather(std::string_view mine) { return all_gather_over_mpi(mine); }

absl::Status Bootstrap::all_equal(const std::string& name, const std::string& mine) {
  const std::vector<std::string> values = all_gather(mine);
  std::vector<int> different;
  for (int r = 1; r < size(); ++r) {
    if (values[r] != values[0]) different.push_back(r);
  }
  if (different.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(different.size() == 1 ? "rank " : "ranks ",
                                                    absl::StrJoin(different, ", "),
                                                    different.size() == 1 ? " has" : " have", " another ", name,
                                                    " than rank 0: ", values[different[0]], " instead of ", values[0]));
}

}  // namespace octet
