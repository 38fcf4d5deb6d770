// The CPU kernels for one instruction set: compiled once each, with DSK_ISA as the namespace.
//
// Only conversions know the 16-bit formats: they go through buffers that stay in the first-level cache, so the update
// itself is always the same fp32 loop.
#include "cpu_body.h"

#include <stdlib.h>

#include "opt_math.h"

namespace DSK_ISA {
namespace {

constexpr int64_t kChunk = 1024;  // elements that are converted at a time
constexpr int64_t kLanes = 16;   // elements of a vector
constexpr int64_t kAhead = 256;  // elements that are prefetched ahead: 1 KiB

// `n` elements as fp32: where they are, or converted into `buffer`.
const float *load(const void *from, int32_t type, int64_t at, int64_t n, float *buffer) {
  if (type == DSK_F32) return (const float *)from + at;
  const uint16_t *bits = (const uint16_t *)from + at;
  if (type == DSK_BF16) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) buffer[i] = dsk_from_bf16(bits[i]);
  } else {
    for (int64_t i = 0; i < n; i++) buffer[i] = dsk_from_f16(bits[i]);
  }
  return buffer;
}

void store(const float *values, void *to, int32_t type, int64_t at, int64_t n) {
  if (type == DSK_F32) return;
  uint16_t *bits = (uint16_t *)to + at;
  if (type == DSK_BF16) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) bits[i] = dsk_to_bf16(values[i]);
  } else {
    for (int64_t i = 0; i < n; i++) bits[i] = dsk_to_f16(values[i]);
  }
}

void store_stochastic(const float *values, void *to, int64_t at, int64_t n, uint64_t seed, int64_t first) {
  uint16_t *bits = (uint16_t *)to + at;
#pragma omp simd
  for (int64_t i = 0; i < n; i++)
    bits[i] = dsk_to_bf16_stochastic(values[i], dsk_random(seed, (uint64_t)(first + at + i)));
}

template <int DECAY>
void adam(const dsk_args &given, float *__restrict p, const float *__restrict g, float *__restrict m,
          float *__restrict v, int64_t n) {
  const dsk_args a = given;
  int64_t whole = n / kLanes * kLanes;
  for (int64_t at = 0; at < whole; at += kLanes) {
    __builtin_prefetch(p + at + kAhead, 1);
    __builtin_prefetch(g + at + kAhead, 0);
    __builtin_prefetch(m + at + kAhead, 1);
    __builtin_prefetch(v + at + kAhead, 1);
#pragma omp simd
    for (int64_t i = at; i < at + kLanes; i++) dsk_adam<DECAY>(a, p[i], g[i], m[i], v[i]);
  }
  for (int64_t i = whole; i < n; i++) dsk_adam<DECAY>(a, p[i], g[i], m[i], v[i]);
}

template <int DECAY>
void adagrad(const dsk_args &given, float *__restrict p, const float *__restrict g, float *__restrict sum, int64_t n) {
  const dsk_args a = given;
  int64_t whole = n / kLanes * kLanes;
  for (int64_t at = 0; at < whole; at += kLanes) {
    __builtin_prefetch(p + at + kAhead, 1);
    __builtin_prefetch(g + at + kAhead, 0);
    __builtin_prefetch(sum + at + kAhead, 1);
#pragma omp simd
    for (int64_t i = at; i < at + kLanes; i++) dsk_adagrad<DECAY>(a, p[i], g[i], sum[i]);
  }
  for (int64_t i = whole; i < n; i++) dsk_adagrad<DECAY>(a, p[i], g[i], sum[i]);
}

// Elements `at` to `at + n` of one tensor, all in one pass while they are in the cache.
void update(const dsk_tensor &t, const dsk_args &a, int64_t at, int64_t n) {
  alignas(64) float p_buffer[kChunk], g_buffer[kChunk], m_buffer[kChunk], v_buffer[kChunk];
  for (int64_t stop = at + n; at < stop; at += kChunk) {
    int64_t count = stop - at < kChunk ? stop - at : kChunk;
    float *p = (float *)load(t.p, t.p_type, at, count, p_buffer);
    const float *g = load(t.g, t.g_type, at, count, g_buffer);
    float *v = (float *)load(t.v, t.state_type, at, count, v_buffer);
    if (a.rule == DSK_ADAGRAD) {
      (a.decay_kind == DSK_L2 ? adagrad<DSK_L2> : adagrad<DSK_NONE>)(a, p, g, v, count);
    } else {
      float *m = (float *)load(t.m, t.state_type, at, count, m_buffer);
      (a.decay_kind == DSK_L2          ? adam<DSK_L2>
       : a.decay_kind == DSK_DECOUPLED ? adam<DSK_DECOUPLED>
                                       : adam<DSK_NONE>)(a, p, g, m, v, count);
      store(m, t.m, t.state_type, at, count);
    }
    store(v, t.v, t.state_type, at, count);
    if (a.stochastic && t.p_type == DSK_BF16)
      store_stochastic(p, t.p, at, count, a.seed, t.first);
    else
      store(p, t.p, t.p_type, at, count);
    if (t.copy) store(p, t.copy, t.copy_type, at, count);
  }
}

double in_halves(double *lanes) {
  for (int64_t half = DSK_NORM_LANES / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// Sum of squares of at most DSK_NORM_BLOCK elements.
double squares(const void *x, int32_t type, int64_t at, int64_t n) {
  static_assert(kChunk % DSK_NORM_LANES == 0, "a chunk begins with the first sum");
  alignas(64) float buffer[kChunk];
  alignas(64) double lanes[DSK_NORM_LANES] = {0};
  for (int64_t stop = at + n; at < stop; at += kChunk) {
    int64_t count = stop - at < kChunk ? stop - at : kChunk;
    const float *values = load(x, type, at, count, buffer);
    int64_t rows = count / DSK_NORM_LANES * DSK_NORM_LANES;
    for (int64_t row = 0; row < rows; row += DSK_NORM_LANES) {
      for (int64_t lane = 0; lane < DSK_NORM_LANES; lane += kLanes) {
#pragma omp simd
        for (int64_t i = lane; i < lane + kLanes; i++) lanes[i] = dsk_add_square(lanes[i], values[row + i]);
      }
    }
    for (int64_t i = rows; i < count; i++) lanes[i - rows] = dsk_add_square(lanes[i - rows], values[i]);
  }
  return in_halves(lanes);
}

int64_t blocks_of(int64_t n) { return (n + DSK_NORM_BLOCK - 1) / DSK_NORM_BLOCK; }

}  // namespace

void step(const dsk_tensor *tensors, int64_t count, const dsk_args *args, int32_t threads) {
  int64_t total = 0;
  for (int64_t k = 0; k < count; k++) total += tensors[k].n;
  // Few elements aren't worth waking threads for.
  int64_t parts = total / DSK_NORM_BLOCK + 1 < threads ? total / DSK_NORM_BLOCK + 1 : threads;
#pragma omp parallel for num_threads((int)parts) schedule(static, 1) if (parts > 1)
  for (int64_t part = 0; part < parts; part++) {
    int64_t first = total * part / parts / kLanes * kLanes;
    int64_t stop = part + 1 == parts ? total : total * (part + 1) / parts / kLanes * kLanes;
    for (int64_t k = 0, begin = 0; k < count && begin < stop; begin += tensors[k].n, k++) {
      int64_t from = first > begin ? first - begin : 0;
      int64_t to = stop - begin < tensors[k].n ? stop - begin : tensors[k].n;
      if (from < to) update(tensors[k], *args, from, to - from);
    }
  }
}

double sum_of_squares(const dsk_tensor *tensors, int64_t count, int32_t threads) {
  int64_t total = 0;
  for (int64_t k = 0; k < count; k++) total += blocks_of(tensors[k].n);
  double *sums = (double *)malloc((total ? total : 1) * sizeof(double));
  int64_t parts = total < threads ? (total ? total : 1) : threads;
#pragma omp parallel for num_threads((int)parts) schedule(static, 1) if (parts > 1)
  for (int64_t part = 0; part < parts; part++) {
    int64_t first = total * part / parts, stop = total * (part + 1) / parts;
    for (int64_t k = 0, begin = 0; k < count && begin < stop; begin += blocks_of(tensors[k].n), k++) {
      int64_t last = begin + blocks_of(tensors[k].n) < stop ? begin + blocks_of(tensors[k].n) : stop;
      for (int64_t block = first > begin ? first : begin; block < last; block++) {
        int64_t at = (block - begin) * DSK_NORM_BLOCK;
        int64_t n = tensors[k].n - at < DSK_NORM_BLOCK ? tensors[k].n - at : DSK_NORM_BLOCK;
        sums[block] = squares(tensors[k].g, tensors[k].g_type, at, n);
      }
    }
  }
  double lanes[DSK_NORM_LANES] = {0};
  for (int64_t block = 0; block < total; block++) lanes[block % DSK_NORM_LANES] += sums[block];
  free(sums);
  return in_halves(lanes);
}

}  // namespace DSK_ISA
