// Cases that a test wrote to a file, and where their results go.
#pragma once
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "../../csrc/cuda/types.h"

namespace emulation {

// Memory that ends where its contents end, at a chosen distance from an aligned address: the sanitizer sees
// every step outside. Several pieces lie far apart, in memory of which only the touched pages exist.
class Buffer {
 public:
  Buffer(size_t bytes, size_t misalignment, size_t pieces, size_t distance)
      : bytes_(bytes), misalignment_(misalignment), pieces_(pieces), distance_(distance) {
    if (pieces > 1) {
      memory_ = static_cast<char*>(mmap(nullptr, misalignment + pieces * distance, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    } else {
      memory_ = static_cast<char*>(operator new(bytes + misalignment, std::align_val_t(64)));
      ASAN_POISON_MEMORY_REGION(memory_, misalignment);
    }
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    if (pieces_ > 1) {
      munmap(memory_, misalignment_ + pieces_ * distance_);
    } else {
      ASAN_UNPOISON_MEMORY_REGION(memory_, misalignment_);
      operator delete(memory_, std::align_val_t(64));
    }
  }
  char* data() const { return memory_ + misalignment_; }

  // Calls body(start) for every piece of bytes().
  template <class Body>
  void for_each_piece(const Body& body) const {
    for (size_t i = 0; i < pieces_; ++i) body(data() + i * distance_);
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_, misalignment_, pieces_, distance_;
  char* memory_;
};

class Cases {
 public:
  Cases(const char* cases, const char* results)
      : in_(std::fopen(cases, "rb")), out_(std::fopen(results, "wb")) {
    if (in_ == nullptr || out_ == nullptr) std::exit(2);
  }
  ~Cases() { std::fclose(in_), std::fclose(out_); }

  bool next() {
    const int c = std::fgetc(in_);
    buffers_.clear();
    return c != EOF;
  }
  int64_t integer() { return read<int64_t>(); }
  double real() { return read<double>(); }
  std::string text() {
    std::string result(static_cast<size_t>(integer()), ' ');
    read(result.data(), result.size());
    return result;
  }
  void integers(int64_t* out, int count) {
    for (int i = 0; i < count; ++i) out[i] = integer();
  }
  fused_losses::Dtype dtype() { return static_cast<fused_losses::Dtype>(integer()); }

  // Null where the test passed none.
  template <class T>
  T* buffer() {
    const int64_t bytes = integer(), misalignment = integer(), pieces = integer(), distance = integer();
    if (bytes < 0) return nullptr;
    buffers_.push_back(std::make_unique<Buffer>(bytes, misalignment, pieces, distance));
    buffers_.back()->for_each_piece([&](char* piece) { read(piece, static_cast<size_t>(bytes)); });
    return reinterpret_cast<T*>(buffers_.back()->data());
  }
  // Everything that was given, as the kernels left it.
  void write_back() {
    for (const auto& buffer : buffers_) {
      buffer->for_each_piece([&](char* piece) { std::fwrite(piece, 1, buffer->bytes(), out_); });
    }
  }

 private:
  template <class V>
  V read() {
    V value;
    read(&value, sizeof(V));
    return value;
  }
  void read(void* to, size_t bytes) {
    if (bytes > 0 && std::fread(to, bytes, 1, in_) != 1) std::exit(2);
  }

  FILE *in_, *out_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
};

// Calls run with a null pointer of an element type that this program was built for.
template <class Run>
void for_element_type(fused_losses::Dtype dtype, const Run& run) {
  switch (dtype) {
    case fused_losses::Dtype::Float: return run(static_cast<float*>(nullptr));
#ifndef EMULATION_FLOAT_ONLY
    case fused_losses::Dtype::Double: return run(static_cast<double*>(nullptr));
    case fused_losses::Dtype::BFloat16: return run(static_cast<fused_losses::BFloat16*>(nullptr));
    case fused_losses::Dtype::Half: return run(static_cast<fused_losses::Half*>(nullptr));
#endif
    default: std::exit(2);
  }
}

inline void expect_success(cudaError_t error) {
  if (error != cudaSuccess) emulation::fail("a launch failed");
}

}  // namespace emulation

namespace fused_losses {
// What the kernels' extern __shared__ array is here.
alignas(16) unsigned char block_memory[emulation::kMostSharedBytes];
}  // namespace fused_losses
