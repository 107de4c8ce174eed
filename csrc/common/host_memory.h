// Memory of large CPU tensors, kept when they are freed and lent again: faulting in a fresh gradient of
// hundreds of megabytes takes longer than computing it. While kept, the pages are the kernel's to take back.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <string>

// In torch since 2.11. Weak: where it is missing, nothing is kept.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
                int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace fused_losses {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kLargeTensor = 4 * kHugePage;  // bytes

// Advises the kernel on the whole huge pages of a range.
inline void advise(void* data, int64_t bytes, int advice) {
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, advice);
}

class KeptMemory {
 public:
  // Memory of torch's own allocator, which frees it with the block.
  struct Block {
    torch::stable::Tensor owner;
    void* data;
    int64_t bytes;
  };

  // FUSED_LOSSES_CPU_CACHE=0 keeps nothing.
  static bool is_on() {
    static const char* wanted = std::getenv("FUSED_LOSSES_CPU_CACHE");
    static const bool on = torch_from_blob != nullptr && (wanted == nullptr || std::string(wanted) != "0");
    return on;
  }

  // Never destroyed: tensors that borrow from it may live until the process ends.
  static KeptMemory& instance() {
    static auto* memory = new KeptMemory;
    return *memory;
  }

  // A kept block of this size or up to a quarter more, or null.
  Block* take(int64_t bytes) {
    for (auto& slot : slots_) {
      Block* block = slot.exchange(nullptr);
      if (block == nullptr) continue;
      if (block->bytes >= bytes && block->bytes <= bytes + bytes / 4) return block;
      put(block);
    }
    return nullptr;
  }

  void give_back(Block* block) {
    advise(block->data, block->bytes, MADV_FREE);
    put(block);
  }

  void clear() {
    for (auto& slot : slots_) delete slot.exchange(nullptr);
  }

 private:
  // Slots rather than a lock: a process that is forked while another thread holds a lock could never take it.
  void put(Block* block) {
    for (auto& slot : slots_) {
      Block* expected = nullptr;
      if (slot.compare_exchange_strong(expected, block)) return;
    }
    delete slots_[evicted_++ % slots_.size()].exchange(block);
  }

  std::array<std::atomic<Block*>, 8> slots_ = {};
  std::atomic<unsigned> evicted_{0};
};

}  // namespace fused_losses
