#pragma once
#include <cstdint>

namespace fused_losses {

// What forward knows of a row: maxima and log-sums of both, and the sums over classes of p times the value's
// derivative with respect to p.
enum DivergenceStatistic : int64_t {
  kStudentMaximum,
  kStudentLogSum,
  kTeacherMaximum,
  kTeacherLogSum,
  kStudentTotal,
  kTeacherTotal,
  kDivergenceStatistics
};

}  // namespace fused_losses
