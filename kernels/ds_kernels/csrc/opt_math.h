// The arithmetic of one element, compiled for the CPU and for CUDA alike.
//
// Every rounding is written out: fused multiply-adds where one is meant, and single operations that no compiler may join
// (the host is built with -ffp-contract=off). So the bits are the same on any instruction set, thread count and device.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#else
#include <string.h>
#endif

#if defined(__CUDA_ARCH__)
#define DSK_FMA(a, b, c) __fmaf_rn((a), (b), (c))
#define DSK_MUL(a, b) __fmul_rn((a), (b))
#define DSK_ADD(a, b) __fadd_rn((a), (b))
#define DSK_DIV(a, b) __fdiv_rn((a), (b))
#define DSK_SQRT(a) __fsqrt_rn(a)
#else
#define DSK_FMA(a, b, c) __builtin_fmaf((a), (b), (c))
#define DSK_MUL(a, b) ((a) * (b))
#define DSK_ADD(a, b) ((a) + (b))
#define DSK_DIV(a, b) ((a) / (b))
#define DSK_SQRT(a) __builtin_sqrtf(a)
#endif

#if defined(__CUDACC__)
#define DSK_FN __host__ __device__ __forceinline__
#else
#define DSK_FN static inline __attribute__((always_inline))
#endif

enum dsk_dtype { DSK_F32 = 0, DSK_BF16 = 1, DSK_F16 = 2 };
enum dsk_rule { DSK_ADAM = 0, DSK_ADAGRAD = 1 };
// What weight decay does: nothing, added to the gradient (L2), or taken from the parameter (decoupled).
enum dsk_decay { DSK_NONE = 0, DSK_L2 = 1, DSK_DECOUPLED = 2 };

// One tensor of a step. `copy` is where the updated parameter also goes in 16 bits, or null; `m` is null for Adagrad,
// whose sum is `v`. `first` numbers its first element among all, for stochastic rounding.
typedef struct {
  void *p;
  const void *g;
  void *m;
  void *v;
  void *copy;
  int64_t n;
  int64_t first;
  int32_t p_type, g_type, state_type, copy_type;
} dsk_tensor;

// What all tensors of a step share, made by dsk_arguments.
typedef struct {
  float scale;         // the gradient is multiplied by it: unscale, clip, sign
  float beta1, rest1;  // rest = 1 - beta
  float beta2, rest2;
  float inverse_root;  // 1 / sqrt(1 - beta2^step); 1 for Adagrad
  float eps;
  float decay;         // weight decay (L2), or -lr * weight decay (decoupled)
  float rate;          // lr / (1 - beta1^step); lr / (1 + (step - 1) * lr_decay) for Adagrad
  int32_t rule;        // dsk_rule
  int32_t decay_kind;  // dsk_decay
  int32_t stochastic;  // 16-bit parameters (bf16) are rounded stochastically
  uint64_t seed;       // of that; another one at every step
} dsk_args;

// What the arguments of a step are made from: a parameter group's constants.
typedef struct {
  double lr, beta1, beta2, eps, weight_decay, lr_decay;
  double sign;         // -1 where the loss is maximized
  uint64_t seed;       // the step's number is added to it
  int32_t rule, decay_kind, stochastic;
} dsk_rates;

// The arguments of the step of this number, the first being 1; gradients are multiplied by `factor`. Differences such as
// 1 - beta are taken in double.
DSK_FN dsk_args dsk_arguments(const dsk_rates &r, double lr, double step, double factor) {
  dsk_args a = {};
  a.scale = (float)(r.sign * factor);
  a.eps = (float)r.eps;
  a.rule = r.rule;
  a.decay_kind = r.decay_kind;
  a.stochastic = r.stochastic;
  a.seed = r.seed + (uint64_t)step;
  a.decay = (float)(r.decay_kind == DSK_DECOUPLED ? -lr * r.weight_decay : r.weight_decay);
  a.inverse_root = 1.0f;
  if (r.rule == DSK_ADAGRAD) {
    a.rate = (float)(lr / (1.0 + (step - 1.0) * r.lr_decay));
    return a;
  }
  a.beta1 = (float)r.beta1;
  a.rest1 = (float)(1.0 - r.beta1);
  a.beta2 = (float)r.beta2;
  a.rest2 = (float)(1.0 - r.beta2);
  a.inverse_root = (float)(1.0 / sqrt(1.0 - pow(r.beta2, step)));
  a.rate = (float)(lr / (1.0 - pow(r.beta1, step)));
  return a;
}

// -- 16-bit formats ---------------------------------------------------------------------------------------------------

typedef union {
  float f;
  uint32_t u;
} dsk_word;

DSK_FN float dsk_from_bf16(uint16_t bits) {
  dsk_word word;
  word.u = (uint32_t)bits << 16;
  return word.f;
}

// Round to nearest even; a NaN becomes torch's.
DSK_FN uint16_t dsk_to_bf16(float value) {
  dsk_word word;
  word.f = value;
  uint32_t rounded = (word.u + 0x7FFFu + ((word.u >> 16) & 1u)) >> 16;
  return (word.u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : (uint16_t)rounded;
}

DSK_FN float dsk_from_f16(uint16_t bits) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(bits));
#else
  _Float16 half;
  memcpy(&half, &bits, 2);
  return (float)half;
#endif
}

DSK_FN uint16_t dsk_to_f16(float value) {
  uint16_t bits;
#if defined(__CUDACC__)
  bits = __half_as_ushort(__float2half_rn(value));
#else
  _Float16 half = (_Float16)value;
  memcpy(&bits, &half, 2);
#endif
  return value != value ? (uint16_t)0x7E00u : bits;
}

// A hash of (seed, place): the same number wherever the element is computed.
DSK_FN uint32_t dsk_random(uint64_t seed, uint64_t place) {
  uint32_t x = (uint32_t)place * 0x9E3779B9u + (uint32_t)seed;
  x ^= (uint32_t)(seed >> 32) + (uint32_t)(place >> 32) * 0x85EBCA6Bu;
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// Up or down with the probability that the bits cut off say; what isn't finite stays as it is.
DSK_FN uint16_t dsk_to_bf16_stochastic(float value, uint32_t random) {
  dsk_word word;
  word.f = value;
  uint32_t rounded = (word.u + (random & 0xFFFFu)) >> 16;
  return (word.u & 0x7F800000u) == 0x7F800000u ? dsk_to_bf16(value) : (uint16_t)rounded;
}

// -- the update -------------------------------------------------------------------------------------------------------

// The kind of decay is a template argument and not a factor of 0: an infinite parameter would give a NaN.
template <int DECAY>
DSK_FN float dsk_gradient(const dsk_args &a, float g, float p) {
  g = DSK_MUL(a.scale, g);
  return DECAY == DSK_L2 ? DSK_FMA(a.decay, p, g) : g;
}

// Adam (arXiv 1412.6980), or AdamW (arXiv 1711.05101) where decay is decoupled.
template <int DECAY>
DSK_FN void dsk_adam(const dsk_args &a, float &p, float g, float &m, float &v) {
  g = dsk_gradient<DECAY>(a, g, p);
  if (DECAY == DSK_DECOUPLED) p = DSK_FMA(a.decay, p, p);
  m = DSK_FMA(a.beta1, m, DSK_MUL(a.rest1, g));
  v = DSK_FMA(a.beta2, v, DSK_MUL(DSK_MUL(a.rest2, g), g));
  p = DSK_FMA(-a.rate, DSK_DIV(m, DSK_FMA(DSK_SQRT(v), a.inverse_root, a.eps)), p);
}

// Adagrad (Duchi et al. 2011), as torch has it: decay is L2 or nothing.
template <int DECAY>
DSK_FN void dsk_adagrad(const dsk_args &a, float &p, float g, float &sum) {
  g = dsk_gradient<DECAY>(a, g, p);
  sum = DSK_FMA(g, g, sum);
  p = DSK_FMA(-a.rate, DSK_DIV(g, DSK_ADD(DSK_SQRT(sum), a.eps)), p);
}

// -- the norm ---------------------------------------------------------------------------------------------------------

// Squares are summed in blocks of DSK_NORM_BLOCK elements by DSK_NORM_LANES sums each, element i of a block by sum
// i % lanes. Those are added in halves (lane + lane + half); block b of all tensors by sum b % lanes, in halves again.
// Squares of fp32 are exact in double, so only that order decides the bits, and a fused addition gives the same.
#define DSK_NORM_BLOCK 16384
#define DSK_NORM_LANES 256

DSK_FN double dsk_add_square(double sum, float value) {
#if defined(__FMA__) || defined(__CUDA_ARCH__)
  return __builtin_fma((double)value, (double)value, sum);
#else
  return sum + (double)value * (double)value;
#endif
}
