#pragma once
#include <cstdint>

namespace fused_losses {

// What forward knows of a row: of both, the maximum, the sum of exp(z - maximum) and its logarithm, and the
// mean of the value's derivative with respect to the probabilities, in two parts.
enum DivergenceStatistic : int64_t {
  kStudentMaximum,
  kStudentSum,
  kStudentLogSum,
  kStudentMean,
  kStudentMeanLow,
  kTeacherMaximum,
  kTeacherSum,
  kTeacherLogSum,
  kTeacherMean,
  kTeacherMeanLow,
  kDivergenceStatistics
};

}  // namespace fused_losses
