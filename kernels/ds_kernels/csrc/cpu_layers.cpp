// Cross-entropy and its gradient in one buffer, compiled once for each instruction set with DSK_ISA as the namespace.
#include "cpu_layers.h"

#include <math.h>
#include <stdlib.h>

#include "opt_math.h"

namespace DSK_ISA {
namespace {

constexpr int64_t kLanes = 16;  // sums that go on side by side, so that they are vectors

// e^x for x <= 88: 2^n p(r) with |r| <= ln 2 / 2, to 2 units in the last place; what isn't a number stays none.
DSK_FN float exponential(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
  float in_range = x < -87.0f ? -87.0f : x;
  float shifted = DSK_FMA(in_range, 1.44269504f, magic), n = shifted - magic;
  float r = DSK_FMA(n, -0.693359375f, in_range);
  r = DSK_FMA(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = DSK_FMA(p, r, 1.3981999507e-3f);
  p = DSK_FMA(p, r, 8.3334519073e-3f);
  p = DSK_FMA(p, r, 4.1665795894e-2f);
  p = DSK_FMA(p, r, 1.6666665459e-1f);
  p = DSK_FMA(p, r, 5.0000001201e-1f);
  p = DSK_FMA(p, r * r, r + 1.0f);
  union {
    float value;
    uint32_t bits;
  } scale, whole;
  whole.value = shifted;
  scale.bits = (whole.bits + 127u) << 23;  // the low bits of `shifted` are n
  return x < -87.0f ? 0.0f : p * scale.value;
}

DSK_FN float widen(float x) { return x; }
DSK_FN float widen(uint16_t x) { return dsk_from_bf16(x); }
DSK_FN void put(float value, float &to) { to = value; }
DSK_FN void put(float value, uint16_t &to) { to = dsk_to_bf16(value); }

template <class T>
float highest(const T *x, int64_t n) {
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; i++) lanes[i] = -INFINITY;
  int64_t at = 0;
  for (; at + kLanes <= n; at += kLanes) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; i++) {
      float value = widen(x[at + i]);
      lanes[i] = lanes[i] > value ? lanes[i] : value;
    }
  }
  for (; at < n; at++) lanes[0] = lanes[0] > widen(x[at]) ? lanes[0] : widen(x[at]);
  float most = lanes[0];
  for (int64_t i = 1; i < kLanes; i++) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

template <class T>
float sum_of_exponentials(const T *x, int64_t n, float shift) {
  float lanes[kLanes] = {0};
  int64_t at = 0;
  for (; at + kLanes <= n; at += kLanes) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; i++) lanes[i] += exponential(widen(x[at + i]) - shift);
  }
  for (; at < n; at++) lanes[0] += exponential(widen(x[at]) - shift);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <class T>
double entropy_of_row(T *x, const int64_t *labels, const dsk_entropy &e) {
  int64_t count = 0;
  for (int64_t k = 0; k < e.labels; k++) count += labels[k] != e.ignored;
  float shift = highest(x, e.width), sum = sum_of_exponentials(x, e.width, shift), share = (float)count / sum;
  double loss = 0.0;
  for (int64_t k = 0; k < e.labels; k++)
    if (labels[k] != e.ignored) loss += log((double)sum) + ((double)shift - widen(x[labels[k]]));
  if (!e.gradient) return loss;
  // In fp32 until the end: what a label takes off is taken off before the rounding.
  float own[DSK_MOST_LABELS];
  for (int64_t k = 0; k < e.labels; k++)
    if (labels[k] != e.ignored) own[k] = share * exponential(widen(x[labels[k]]) - shift);
#pragma omp simd
  for (int64_t i = 0; i < e.width; i++) put(share * exponential(widen(x[i]) - shift), x[i]);
  for (int64_t k = 0; k < e.labels; k++) {
    if (labels[k] == e.ignored) continue;
    for (int64_t other = 0; other < e.labels; other++) own[k] -= labels[other] == labels[k] ? 1.0f : 0.0f;
    put(own[k], x[labels[k]]);
  }
  return loss;
}

}  // namespace

double entropy(const dsk_entropy &e, int32_t threads) {
  double *losses = (double *)malloc((e.rows ? e.rows : 1) * sizeof(double)), total = 0.0;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < e.rows; row++) {
    const int64_t *labels = e.label + row * e.labels;
    losses[row] = e.type == DSK_F32 ? entropy_of_row((float *)e.logits + row * e.width, labels, e)
                                    : entropy_of_row((uint16_t *)e.logits + row * e.width, labels, e);
  }
  for (int64_t row = 0; row < e.rows; row++) total += losses[row];
  free(losses);
  return total;
}

}  // namespace DSK_ISA
