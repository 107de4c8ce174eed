// Element types, as kernels and bindings name them.
#pragma once
#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace fused_losses {

using c10::BFloat16;
using c10::Half;

enum class Dtype { Float, Double, BFloat16, Half };

// What elements of a type are computed and summed in.
template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace fused_losses
