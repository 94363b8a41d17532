// A module that the opener can be tested with where there is no GPU: what it claims is given when it is built.
#include "kernels/cuda/module.h"

namespace octet::cuda {
namespace {

int device_count(const char** why) {
  *why = "the driver is missing";
  return OCTET_FAKE_DEVICES;
}

DeviceFacts device_facts(int) { return {.name = "Old Card", .major = OCTET_FAKE_MAJOR, .minor = 5, .memory_bytes = 1}; }

constexpr ModuleTable kTable = {
    .abi = OCTET_FAKE_ABI,
    .built_for = "nothing",
    .device_count = device_count,
    .device_facts = device_facts,
    .open_queue = nullptr,
    .close_queue = nullptr,
    .lacks = nullptr,
    .synchronize = nullptr,
    .is_done = nullptr,
    .watch = nullptr,
    .native_stream = nullptr,
    .allocate = nullptr,
    .release = nullptr,
    .allocate_page_locked = nullptr,
    .release_page_locked = nullptr,
    .begin_recording = nullptr,
    .end_recording = nullptr,
    .launch_recorded = nullptr,
    .release_recorded = nullptr,
    .mark = nullptr,
    .take_marks = nullptr,
    .read_seconds = nullptr,
    .sample = nullptr,
    .backend = nullptr,
    .peer = nullptr,
};

}  // namespace
}  // namespace octet::cuda

extern "C" const octet::cuda::ModuleTable* octet_cuda_module() { return &octet::cuda::kTable; }
