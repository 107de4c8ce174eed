#include "linear.cuh"

namespace fused_losses {
FL_INSTANTIATE_LINEAR(double)
}
