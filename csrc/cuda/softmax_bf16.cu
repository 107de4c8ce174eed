#include "softmax_launch.cuh"

namespace fused_losses {
FL_INSTANTIATE_SOFTMAX(BFloat16)
}
