// Divergences of rows of logits on the CPU: two rows at a time, in the second-level cache.
#include "../ops/divergence.h"

#include <torch/csrc/stable/library.h>

#include "../formulas/divergence_rows.h"
#include "logit_rows.h"

namespace fused_losses {

struct PairSums {
  double value, of_student, of_teacher;
};

template <class A>
struct PairFunctions {
  PairSums (*sums)(const A* s, const A* t, PairRow<A> row, int64_t n);
  Mean<A> (*mean)(double terms, double weights);
  void (*student_gradient)(const A* s, const A* t, PairRow<A> row, A k, Mean<A> mean, int64_t n, A* out);
  void (*teacher_gradient)(const A* s, const A* t, PairRow<A> row, A k, Mean<A> mean, int64_t n, A* out);
};

struct DivergenceTable {
  PairFunctions<float> (*single)(Divergence divergence);
  PairFunctions<double> (*wide)(Divergence divergence);
};

}  // namespace fused_losses

#define FL_KERNELS "../cpu/divergence_kernels.h"
#include "../common/for_each_isa.h"

namespace fused_losses {
namespace {

template <class A>
PairFunctions<A> functions_of(Divergence divergence) {
  const auto& table = choose(isa_default::kDivergences, isa_avx2::kDivergences, isa_avx512::kDivergences);
  if constexpr (sizeof(A) == 4) {
    return table.single(divergence);
  } else {
    return table.wide(divergence);
  }
}

template <class A>
class PairRows {
 public:
  static constexpr int64_t kBlock = LogitRows<A>::kBlock;
  using Block = typename LogitRows<A>::Block;
  struct Scratch {
    alignas(64) Block s, t, of_student, of_teacher;
  };

  explicit PairRows(const DivergenceCall& call)
      : student(call.student, 0.0, call.temperature),
        teacher(call.teacher, 0.0, call.temperature),
        pair_(functions_of<A>(call.divergence)),
        beta_(call.beta) {}

  const LogitRows<A> student, teacher;

  void forward(A* losses, A* statistics) const {
    const int64_t count = student.rows();
    student.for_each_row([&](int64_t row) {
      thread_local Scratch scratch;
      const Sums of_s = sums_of(student, row, scratch.s), of_t = sums_of(teacher, row, scratch.t);
      const PairRow<A> shared = row_of(of_s.distribution(), of_t.distribution());
      PairSums sums{0, 0, 0};
      for_each_block(row, scratch, [&](int64_t, int64_t n, const A* s, const A* t) {
        const PairSums part = pair_.sums(s, t, shared, n);
        sums.value += part.value, sums.of_student += part.of_student, sums.of_teacher += part.of_teacher;
      });
      const Mean<A> mean_s = pair_.mean(sums.of_student, of_s.sum);
      const Mean<A> mean_t = pair_.mean(sums.of_teacher, of_t.sum);
      losses[row] = static_cast<A>(sums.value);
      const auto keep = [&](DivergenceStatistic name, A value) { statistics[name * count + row] = value; };
      keep(kStudentMaximum, shared.student.maximum), keep(kTeacherMaximum, shared.teacher.maximum);
      keep(kStudentSum, shared.student.sum), keep(kTeacherSum, shared.teacher.sum);
      keep(kStudentLogSum, shared.student.log_sum), keep(kTeacherLogSum, shared.teacher.log_sum);
      keep(kStudentMean, mean_s.high), keep(kTeacherMean, mean_t.high);
      keep(kStudentMeanLow, mean_s.low), keep(kTeacherMeanLow, mean_t.low);
    });
  }

  // What a gradient is written to, which may be the logits it is of.
  struct Gradient {
    Output<A> out;
    int64_t stride;
  };

  void backward(const Tensor& grad_losses, const A* statistics, const std::optional<Gradient>& of_student,
                const std::optional<Gradient>& of_teacher) const {
    const int64_t count = student.rows();
    const Dtype dtype = dtype_of(grad_losses.scalar_type());
    const char* upstream = static_cast<const char*>(grad_losses.const_data_ptr());
    student.for_each_row([&](int64_t row) {
      thread_local Scratch scratch;
      const auto known = [&](DivergenceStatistic name) { return statistics[name * count + row]; };
      const PairRow<A> shared = row_of({known(kStudentMaximum), known(kStudentSum), known(kStudentLogSum)},
                                       {known(kTeacherMaximum), known(kTeacherSum), known(kTeacherLogSum)});
      const Mean<A> mean_s{known(kStudentMean), known(kStudentMeanLow)};
      const Mean<A> mean_t{known(kTeacherMean), known(kTeacherMeanLow)};
      A k;
      softmax_functions<A>().load(dtype, upstream + row * element_size(dtype), 1, 1, &k);
      for_each_block(row, scratch, [&](int64_t c, int64_t n, const A* s, const A* t) {
        // Both are computed before either is written: each reads both rows.
        if (of_student) {
          pair_.student_gradient(s, t, shared, k, mean_s, n, scratch.of_student);
          finish(student, k, s, n, scratch.of_student);
        }
        if (of_teacher) {
          pair_.teacher_gradient(s, t, shared, k, mean_t, n, scratch.of_teacher);
          finish(teacher, k, t, n, scratch.of_teacher);
          of_teacher->out.put(scratch.of_teacher, 1, n, row * of_teacher->stride + c);
        }
        if (of_student) of_student->out.put(scratch.of_student, 1, n, row * of_student->stride + c);
      });
    });
  }

 private:
  // The maximum of a row, and the sum of exp(z - maximum).
  struct Sums {
    A maximum;
    double sum;
    Distribution<A> distribution() const { return {maximum, static_cast<A>(sum), log_sum_of(maximum, sum)}; }
  };

  PairRow<A> row_of(const Distribution<A>& student, const Distribution<A>& teacher) const {
    return {student, teacher, static_cast<A>(beta_)};
  }

  Sums sums_of(const LogitRows<A>& logits, int64_t row, Block& scratch) const {
    const A maximum = logits.maximum(row, scratch);
    double sum = 0;
    logits.for_each_block(row, scratch, [&](int64_t, int64_t n, const A* z) {
      sum += softmax_functions<A>().row_sum_exp(z, reference_of(maximum), n).total();
    });
    return {maximum, sum};
  }

  template <class Body>
  void for_each_block(int64_t row, Scratch& scratch, const Body& body) const {
    for (int64_t c = 0; c < student.classes(); c += kBlock) {
      const int64_t n = std::min(kBlock, student.classes() - c);
      body(c, n, student.block(row, c, n, scratch.s), teacher.block(row, c, n, scratch.t));
    }
  }

  // A row that nobody asks for has a gradient of exactly 0, whatever its logits.
  static void finish(const LogitRows<A>& logits, A k, const A* z, int64_t n, A* gradient) {
    if (k == A(0)) {
      std::fill(gradient, gradient + n, A(0));
    } else {
      logits.chain(z, n, gradient);
    }
  }

  PairFunctions<A> pair_;
  double beta_;
};

std::tuple<Tensor, Tensor> divergence_forward(const Tensor& student, const Tensor& teacher,
                                              const std::string& divergence, double beta,
                                              double temperature) {
  const DivergenceCall call = checked_divergence_call(student, teacher, divergence, beta, temperature);
  const ScalarType wide = accumulate_type(student.scalar_type());
  Tensor losses = empty_contiguous({call.rows()}, wide, student);
  Tensor statistics = empty_contiguous({kDivergenceStatistics, call.rows()}, wide, student);
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    PairRows<A>(call).forward(static_cast<A*>(losses.mutable_data_ptr()),
                              static_cast<A*>(statistics.mutable_data_ptr()));
  };
  wide == ScalarType::Double ? run(0.0) : run(0.0f);
  return {losses, statistics};
}

// Fills the gradients that there is memory for.
void fill_gradients(const Tensor& grad_losses, const DivergenceCall& call, const Tensor& statistics,
                    Tensor* student_out, Tensor* teacher_out, bool is_fresh) {
  check_divergence_saved(call, grad_losses, statistics);
  const Tensor upstream = torch::stable::contiguous(grad_losses);
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    using Gradient = typename PairRows<A>::Gradient;
    const auto gradient = [&](Tensor* out) -> std::optional<Gradient> {
      if (out == nullptr) return std::nullopt;
      return Gradient{Output<A>(*out, softmax_functions<A>(), is_fresh), out->strides()[0]};
    };
    PairRows<A>(call).backward(upstream, static_cast<const A*>(statistics.const_data_ptr()),
                               gradient(student_out), gradient(teacher_out));
  };
  call.student.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
}

std::tuple<Tensor, Tensor> divergence_backward(const Tensor& grad_losses, const Tensor& student,
                                               const Tensor& teacher, const Tensor& statistics,
                                               const std::string& divergence, double beta, double temperature,
                                               bool student_grad, bool teacher_grad) {
  const DivergenceCall call = checked_divergence_call(student, teacher, divergence, beta, temperature);
  const auto memory = [&](bool wanted) {
    return empty_contiguous({wanted ? call.rows() : 0, call.classes()}, student.scalar_type(), student);
  };
  Tensor of_student = memory(student_grad), of_teacher = memory(teacher_grad);
  fill_gradients(grad_losses, call, statistics, student_grad ? &of_student : nullptr,
                 teacher_grad ? &of_teacher : nullptr, true);
  return {of_student, of_teacher};
}

void divergence_backward_in_place(const Tensor& grad_losses, Tensor student, Tensor teacher,
                                  const Tensor& statistics, const std::string& divergence, double beta,
                                  double temperature, bool student_grad, bool teacher_grad) {
  const DivergenceCall call = checked_divergence_call(student, teacher, divergence, beta, temperature);
  fill_gradients(grad_losses, call, statistics, student_grad ? &student : nullptr,
                 teacher_grad ? &teacher : nullptr, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) {
  m.impl("divergence_forward", TORCH_BOX(&divergence_forward));
  m.impl("divergence_backward", TORCH_BOX(&divergence_backward));
  m.impl("divergence_backward_", TORCH_BOX(&divergence_backward_in_place));
}

}  // namespace fused_losses
