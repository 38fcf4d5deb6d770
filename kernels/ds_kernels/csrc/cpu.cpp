// The C ABI of the CPU build: picks the widest instruction set that the processor has, or the one that is asked for.
#include "cpu_body.h"
#include "cpu_layers.h"

enum { ISA_PLAIN = 0, ISA_AVX2 = 1, ISA_AVX512 = 2 };

extern "C" {

// The widest instruction set here: 0 plain, 1 AVX2, 2 AVX-512.
int32_t dsk_cpu_isa(void) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return ISA_AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return ISA_AVX2;
#endif
  return ISA_PLAIN;
}

void dsk_cpu_arguments(const dsk_rates *rates, double step, double factor, dsk_args *args) {
  *args = dsk_arguments(*rates, rates->lr, step, factor);
}

// One optimizer step of `count` tensors on `threads` threads, by the instruction set `isa` (at most dsk_cpu_isa()).
void dsk_cpu_step(const dsk_tensor *tensors, int64_t count, const dsk_args *args, int32_t threads, int32_t isa) {
#if defined(__x86_64__)
  if (isa == ISA_AVX512) return avx512::step(tensors, count, args, threads);
  if (isa == ISA_AVX2) return avx2::step(tensors, count, args, threads);
#endif
  plain::step(tensors, count, args, threads);
}

// Sum of the squares of the tensors' `g`, in double.
double dsk_cpu_sum_of_squares(const dsk_tensor *tensors, int64_t count, int32_t threads, int32_t isa) {
#if defined(__x86_64__)
  if (isa == ISA_AVX512) return avx512::sum_of_squares(tensors, count, threads);
  if (isa == ISA_AVX2) return avx2::sum_of_squares(tensors, count, threads);
#endif
  return plain::sum_of_squares(tensors, count, threads);
}

// The summed cross-entropy.
double dsk_cpu_entropy(const dsk_entropy *e, int32_t threads, int32_t isa) {
#if defined(__x86_64__)
  if (isa == ISA_AVX512) return avx512::entropy(*e, threads);
  if (isa == ISA_AVX2) return avx2::entropy(*e, threads);
#endif
  return plain::entropy(*e, threads);
}
}
