#include "launch/nvml.h"

#include <dlfcn.h>

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace octet {
namespace {

// Of nvml.h, as far as it is used. Its ABI does not change: new versions of a function get new names.
using Result = int;
using Device = void*;
constexpr Result kSuccess = 0;
constexpr int kP2pRead = 0, kP2pOk = 0;  // NVML_P2P_CAPS_INDEX_READ, NVML_P2P_STATUS_OK
constexpr unsigned kTextBytes = 96;

struct Memory {
  unsigned long long total, free, used;
};

}  // namespace

struct Nvml::Functions {
  ~Functions() {
    if (initialised) shutdown();
    if (library != nullptr) dlclose(library);
  }

  // Leaves *function null and notes the name when the library lacks it.
  template <typename Function>
  void find(const char* name, Function** function) {
    *function = reinterpret_cast<Function*>(dlsym(library, name));
    if (*function == nullptr) missing = name;
  }

  absl::Status check(const char* call, Result result) const {
    if (result == kSuccess) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat(call, ": ", error_string(result)));
  }

  void* library = nullptr;
  bool initialised = false;
  std::string missing;
  Result (*init)() = nullptr;
  Result (*shutdown)() = nullptr;
  const char* (*error_string)(Result) = nullptr;
  Result (*driver_version)(char*, unsigned) = nullptr;
  Result (*count)(unsigned*) = nullptr;
  Result (*handle)(unsigned, Device*) = nullptr;
  Result (*name)(Device, char*, unsigned) = nullptr;
  Result (*uuid)(Device, char*, unsigned) = nullptr;
  Result (*memory)(Device, Memory*) = nullptr;
  Result (*p2p_status)(Device, Device, int, int*) = nullptr;
};

Nvml::Nvml() : functions_(std::make_unique<Functions>()) {}
Nvml::~Nvml() = default;

absl::StatusOr<std::unique_ptr<Nvml>> Nvml::open(const std::string& library) {
  std::unique_ptr<Nvml> nvml(new Nvml);
  Functions& f = *nvml->functions_;
  f.library = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (f.library == nullptr) return absl::NotFoundError(dlerror());
  f.find("nvmlInit_v2", &f.init);
  f.find("nvmlShutdown", &f.shutdown);
  f.find("nvmlErrorString", &f.error_string);
  f.find("nvmlSystemGetDriverVersion", &f.driver_version);
  f.find("nvmlDeviceGetCount_v2", &f.count);
  f.find("nvmlDeviceGetHandleByIndex_v2", &f.handle);
  f.find("nvmlDeviceGetName", &f.name);
  f.find("nvmlDeviceGetUUID", &f.uuid);
  f.find("nvmlDeviceGetMemoryInfo", &f.memory);
  f.find("nvmlDeviceGetP2PStatus", &f.p2p_status);
  if (!f.missing.empty()) return absl::UnavailableError(absl::StrCat(library, " has no ", f.missing));
  if (absl::Status status = f.check("nvmlInit_v2", f.init()); !status.ok()) return status;
  f.initialised = true;
  return nvml;
}

absl::StatusOr<GpuNodeFacts> Nvml::read() const {
  const Functions& f = *functions_;
  GpuNodeFacts facts;
  char text[kTextBytes] = {};
  absl::Status status = f.check("nvmlSystemGetDriverVersion", f.driver_version(text, kTextBytes));
  facts.driver = text;
  unsigned count = 0;
  if (status.ok()) status = f.check("nvmlDeviceGetCount_v2", f.count(&count));
  std::vector<Device> devices(count);
  for (unsigned i = 0; status.ok() && i < count; ++i) {
    GpuFacts gpu;
    Memory memory{};
    status = f.check("nvmlDeviceGetHandleByIndex_v2", f.handle(i, &devices[i]));
    if (status.ok()) status = f.check("nvmlDeviceGetName", f.name(devices[i], text, kTextBytes));
    gpu.name = text;
    if (status.ok()) status = f.check("nvmlDeviceGetUUID", f.uuid(devices[i], text, kTextBytes));
    gpu.uuid = text;
    if (status.ok()) status = f.check("nvmlDeviceGetMemoryInfo", f.memory(devices[i], &memory));
    gpu.memory_bytes = static_cast<int64_t>(memory.total);
    gpu.free_bytes = static_cast<int64_t>(memory.free);
    facts.gpus.push_back(std::move(gpu));
  }
  if (!status.ok()) return status;
  for (unsigned i = 0; i < count; ++i) {
    for (unsigned j = i + 1; j < count; ++j) {
      int peers = 0;
      // A driver that does not know is taken at its word: not proven.
      const Result result = f.p2p_status(devices[i], devices[j], kP2pRead, &peers);
      if (result != kSuccess || peers != kP2pOk) facts.pairs_without_peer_access.emplace_back(i, j);
    }
  }
  return facts;
}

}  // namespace octet
