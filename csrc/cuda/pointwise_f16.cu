#include "pointwise.cuh"

namespace fused_losses {
FL_INSTANTIATE_POINTWISE(Half)
}
