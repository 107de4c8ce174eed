#include "divergence.cuh"

namespace fused_losses {
FL_INSTANTIATE_DIVERGENCE(double)
}
