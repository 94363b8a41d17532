// A library that answers like the NVIDIA driver's, as far as launch/nvml.cc asks: FAKE_NVML_GPUS GPUs, of which the
// last is no peer of the others when FAKE_NVML_ISLAND is set. FAKE_NVML_BROKEN: the driver does not start.
#include <cstdio>
#include <cstdlib>

namespace {

using Device = void*;
struct Memory {
  unsigned long long total, free, used;
};

unsigned gpus() {
  const char* count = std::getenv("FAKE_NVML_GPUS");
  return count == nullptr ? 0 : static_cast<unsigned>(std::atoi(count));
}

size_t index_of(Device device) { return reinterpret_cast<size_t>(device) - 1; }

}  // namespace

extern "C" {

int nvmlInit_v2() { return std::getenv("FAKE_NVML_BROKEN") == nullptr ? 0 : 9; }
int nvmlShutdown() { return 0; }
const char* nvmlErrorString(int) { return "Driver Not Loaded"; }
int nvmlSystemGetDriverVersion(char* text, unsigned bytes) {
  std::snprintf(text, bytes, "550.54.15");
  return 0;
}
int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = gpus();
  return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device* device) {
  *device = reinterpret_cast<Device>(size_t{index} + 1);
  return index < gpus() ? 0 : 2;
}
int nvmlDeviceGetName(Device, char* text, unsigned bytes) {
  std::snprintf(text, bytes, "NVIDIA H100 80GB HBM3");
  return 0;
}
int nvmlDeviceGetUUID(Device device, char* text, unsigned bytes) {
  std::snprintf(text, bytes, "GPU-%zu", index_of(device));
  return 0;
}
int nvmlDeviceGetMemoryInfo(Device, Memory* memory) {
  *memory = {81559ull << 20, 80000ull << 20, 1559ull << 20};
  return 0;
}
int nvmlDeviceGetP2PStatus(Device, Device second, int, int* status) {
  const bool island = std::getenv("FAKE_NVML_ISLAND") != nullptr && index_of(second) == gpus() - 1;
  *status = island ? 5 : 0;
  return 0;
}

}  // extern "C"
