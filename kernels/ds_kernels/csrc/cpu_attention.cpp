// Causal attention in bf16 for CPUs that multiply it (AVX512_BF16): forward and backward in tiles, as FlashAttention
// (arXiv 2205.14135) does it, with sums in fp32. A query sees the keys from its own first one up to itself, so tiles
// that no query of theirs sees are left out: above the diagonal, in earlier documents, before a sliding window.
//
// Names: T positions, D a head's width, Q and K a tile's queries and keys. "Pairs" are what the processor multiplies: two
// 16-bit numbers that follow each other along the dimension that is summed over, in 32 bits.
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include <cmath>
#include <limits>
#include <vector>

namespace {

constexpr int64_t kTile = 64;    // queries and keys of a tile
constexpr int64_t kLanes = 16;   // numbers of a vector
constexpr int64_t kRows = 6;     // rows that are multiplied at a time

// One head's numbers, D of each position side by side.
struct Rows {
  uint16_t *at;
  int64_t stride;
  uint16_t *row(int64_t t) const { return at + t * stride; }
};

// Four-dimensional tensors (batch, head, position, D) by their strides in elements; those of D follow each other.
struct Tensor {
  uint16_t *at;
  int64_t batch, head, position;
  Rows of(int64_t b, int64_t h) const { return {at + b * batch + h * head, position}; }
};

}  // namespace

extern "C" {

struct dsk_attention {
  Tensor q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  float *log_sum;        // (batch, heads, T): log of each query's sum of exponentials
  const int32_t *first;  // (batch, T): first key that a query sees, which never falls; null: 0
  int64_t batches, heads, key_heads, length, width;
  float scale;
};
}

namespace {

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

__m512 wide16(const uint16_t *from) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}

void store16(uint16_t *to, __m512 values) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(values)); }

// e^x of numbers that aren't above 88: 2^n p(r) with |r| <= ln 2 / 2, to 2 units in the last place.
__m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // in this order what isn't a number stays none
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

__mmask16 lanes_between(int64_t from, int64_t stop) {
  if (from < 0) from = 0;
  if (stop > kLanes) stop = kLanes;
  return stop <= from ? 0 : (__mmask16)(((1u << stop) - 1) & ~((1u << from) - 1));
}

// -- products --------------------------------------------------------------------------------------------------------

template <int M, int N, bool ADD>
void multiply_block(int64_t pairs, const uint16_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride, float *c,
                    int64_t c_stride) {
  __m512 sums[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) sums[m][n] = ADD ? _mm512_loadu_ps(c + m * c_stride + n * kLanes) : _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; k++) {
    __m512bh columns[N];
    for (int n = 0; n < N; n++) columns[n] = (__m512bh)_mm512_loadu_si512(b + k * b_stride + n * kLanes);
    for (int m = 0; m < M; m++) {
      int32_t pair;
      memcpy(&pair, a + m * a_stride + 2 * k, 4);
      __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
      for (int n = 0; n < N; n++) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], row, columns[n]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) _mm512_storeu_ps(c + m * c_stride + n * kLanes, sums[m][n]);
}

template <int N, bool ADD>
void multiply_columns(int64_t rows, int64_t pairs, const uint16_t *a, int64_t a_stride, const uint32_t *b,
                      int64_t b_stride, float *c, int64_t c_stride) {
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows)
    multiply_block<kRows, N, ADD>(pairs, a + m * a_stride, a_stride, b, b_stride, c + m * c_stride, c_stride);
  for (; m + 2 <= rows; m += 2)
    multiply_block<2, N, ADD>(pairs, a + m * a_stride, a_stride, b, b_stride, c + m * c_stride, c_stride);
  for (; m < rows; m++)
    multiply_block<1, N, ADD>(pairs, a + m * a_stride, a_stride, b, b_stride, c + m * c_stride, c_stride);
}

// c (rows, columns) = a (rows, 2 pairs) b, or is added to; b lies as pairs (pairs, columns). Columns are multiples of 16.
template <bool ADD>
void multiply(int64_t rows, int64_t columns, int64_t pairs, const uint16_t *a, int64_t a_stride, const uint32_t *b,
              int64_t b_stride, float *c, int64_t c_stride) {
  int64_t n = 0;
  for (; n + 4 * kLanes <= columns; n += 4 * kLanes)
    multiply_columns<4, ADD>(rows, pairs, a, a_stride, b + n, b_stride, c + n, c_stride);
  for (; n < columns; n += kLanes)
    multiply_columns<1, ADD>(rows, pairs, a, a_stride, b + n, b_stride, c + n, c_stride);
}

// -- other forms of a head -------------------------------------------------------------------------------------------

// A square of 16 x 16 numbers of 32 bits, given and got as rows.
void transpose(__m512i x[kLanes]) {
  __m512i y[kLanes];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  // x[4 r + c] has, of rows 4 r to 4 r + 3, columns c, c + 4, c + 8 and c + 12.
  for (int c = 0; c < 4; c++) {
    __m512i low = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88), high = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
    __m512i low2 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88), high2 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
    y[c] = _mm512_shuffle_i32x4(low, low2, 0x88), y[8 + c] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    y[4 + c] = _mm512_shuffle_i32x4(high, high2, 0x88), y[12 + c] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
  for (int i = 0; i < 16; i++) x[i] = y[i];
}

// (T, D) as pairs along D: (D / 2, `room` >= T), zeros behind T.
void pairs_along_width(Rows x, int64_t length, int64_t width, uint32_t *to, int64_t room) {
  for (int64_t t = 0; t < room; t += kLanes)
    for (int64_t d = 0; d < width / 2; d += kLanes) {
      __m512i square[kLanes];
      __mmask16 real = lanes_between(0, width / 2 - d);
      for (int64_t i = 0; i < kLanes; i++)
        square[i] = t + i < length ? _mm512_maskz_loadu_epi32(real, x.row(t + i) + 2 * d) : _mm512_setzero_si512();
      transpose(square);
      for (int64_t i = 0; i < kLanes && d + i < width / 2; i++) _mm512_storeu_si512(to + (d + i) * room + t, square[i]);
    }
}

// Of 16 numbers of rows t and t + 1 the pairs.
__m512i pairs_of_rows(Rows x, int64_t length, int64_t t, int64_t d) {
  const __m256i none = _mm256_setzero_si256();
  __m256i low = t < length ? _mm256_loadu_si256((const __m256i *)(x.row(t) + d)) : none;
  __m256i high = t + 1 < length ? _mm256_loadu_si256((const __m256i *)(x.row(t + 1) + d)) : none;
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// (T, D) as pairs along T: (`room` / 2, D), zeros behind T.
void pairs_along_length(Rows x, int64_t length, int64_t width, uint32_t *to, int64_t room) {
  for (int64_t t = 0; t < room; t += 2)
    for (int64_t d = 0; d < width; d += kLanes) _mm512_storeu_si512(to + t / 2 * width + d, pairs_of_rows(x, length, t, d));
}

// (T, D) as (D, `room` >= T), zeros behind T.
void transposed(Rows x, int64_t length, int64_t width, uint16_t *to, int64_t room) {
  for (int64_t t = 0; t < room; t += 2 * kLanes)
    for (int64_t d = 0; d < width; d += kLanes) {
      __m512i square[kLanes];
      for (int64_t i = 0; i < kLanes; i++) square[i] = pairs_of_rows(x, length, t + 2 * i, d);
      transpose(square);
      __mmask16 real = lanes_between(0, (room - t) / 2);
      for (int64_t i = 0; i < kLanes; i++) _mm512_mask_storeu_epi32(to + (d + i) * room + t, real, square[i]);
    }
}

// Positions that a form has room for: whole vectors, and one more, so that rows don't all fall on the same cache lines.
int64_t room_of(int64_t length) { return up(length, kLanes) + kLanes; }

// -- passes ----------------------------------------------------------------------------------------------------------

int64_t first_of(const dsk_attention &a, int64_t b, int64_t t) { return a.first ? a.first[b * a.length + t] : 0; }

struct Scratch {
  std::vector<char> memory;
  char *next = nullptr;
  void start(int64_t bytes) {
    if ((int64_t)memory.size() < bytes + 64) memory.resize(bytes + 64);
    next = (char *)up((int64_t)memory.data(), 64);
  }
  template <class T>
  T *take(int64_t count) {
    T *got = (T *)next;
    next += up(count * (int64_t)sizeof(T), 64);
    return got;
  }
};

thread_local Scratch scratch;

// The queries `q0` to `q1` of one head over all keys that they see.
void forward_tile(const dsk_attention &a, int64_t b, int64_t h, int64_t q0, const uint32_t *k_pairs, int64_t room,
                  const uint32_t *v_pairs, float *scores, uint16_t *weights, float *sums) {
  const float lowest = -std::numeric_limits<float>::infinity();
  int64_t q1 = q0 + kTile < a.length ? q0 + kTile : a.length, queries = q1 - q0, width = a.width;
  Rows q = a.q.of(b, h), out = a.out.of(b, h);
  float highest[kTile], total[kTile];
  for (int64_t i = 0; i < queries; i++) highest[i] = lowest, total[i] = 0.0f;
  memset(sums, 0, queries * width * sizeof(float));
  for (int64_t k0 = first_of(a, b, q0) / kTile * kTile; k0 < q1; k0 += kTile) {
    int64_t columns = k0 + kTile < room ? kTile : room - k0;
    multiply<false>(queries, columns, width / 2, q.row(q0), q.stride, k_pairs + k0, room, scores, kTile);
    for (int64_t i = 0; i < queries; i++) {
      int64_t from = first_of(a, b, q0 + i) - k0, stop = q0 + i + 1 - k0;
      __m512 row[kTile / kLanes], most = _mm512_set1_ps(lowest);
      for (int64_t n = 0; n < columns / kLanes; n++) {
        __mmask16 seen = lanes_between(from - n * kLanes, stop - n * kLanes);
        row[n] = _mm512_mask_mul_ps(_mm512_set1_ps(lowest), seen, _mm512_loadu_ps(scores + i * kTile + n * kLanes),
                                    _mm512_set1_ps(a.scale));
        most = _mm512_max_ps(most, row[n]);
      }
      float now = std::fmax(highest[i], _mm512_reduce_max_ps(most));
      // A tile that this query doesn't see.
      float shift = now == lowest ? 0.0f : now, factor = highest[i] == lowest ? 0.0f : std::exp(highest[i] - shift);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t n = 0; n < columns / kLanes; n++) {
        __mmask16 seen = lanes_between(from - n * kLanes, stop - n * kLanes);
        __m512 weight = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(row[n], _mm512_set1_ps(shift))));
        sum = _mm512_add_ps(sum, weight);
        store16(weights + i * kTile + n * kLanes, weight);
      }
      total[i] = total[i] * factor + _mm512_reduce_add_ps(sum);
      if (factor != 1.0f)
        for (int64_t d = 0; d < width; d += kLanes)
          _mm512_storeu_ps(sums + i * width + d, _mm512_mul_ps(_mm512_loadu_ps(sums + i * width + d), _mm512_set1_ps(factor)));
      highest[i] = now;
    }
    multiply<true>(queries, width, columns / 2, weights, kTile, v_pairs + k0 / 2 * width, width, sums, width);
  }
  for (int64_t i = 0; i < queries; i++) {
    __m512 inverse = _mm512_set1_ps(1.0f / total[i]);
    for (int64_t d = 0; d < width; d += kLanes)
      store16(out.row(q0 + i) + d, _mm512_mul_ps(_mm512_loadu_ps(sums + i * width + d), inverse));
    a.log_sum[(b * a.heads + h) * a.length + q0 + i] = highest[i] + std::log(total[i]);
  }
}

// All heads that share the keys and values of key head `kh`.
void forward_heads(const dsk_attention &a, int64_t b, int64_t kh) {
  int64_t room = room_of(a.length), group = a.heads / a.key_heads;
  scratch.start(room * a.width * 8 + kTile * (kTile * 6 + a.width * 4) + 512);
  uint32_t *k_pairs = scratch.take<uint32_t>(room * a.width / 2), *v_pairs = scratch.take<uint32_t>(room * a.width / 2);
  float *scores = scratch.take<float>(kTile * kTile), *sums = scratch.take<float>(kTile * a.width);
  uint16_t *weights = scratch.take<uint16_t>(kTile * kTile);
  pairs_along_width(a.k.of(b, kh), a.length, a.width, k_pairs, room);
  pairs_along_length(a.v.of(b, kh), a.length, a.width, v_pairs, room);
  for (int64_t h = kh * group; h < (kh + 1) * group; h++)
    for (int64_t q0 = 0; q0 < a.length; q0 += kTile)
      forward_tile(a, b, h, q0, k_pairs, room, v_pairs, scores, weights, sums);
}

// One query head's forms and sums in the backward pass.
struct Backward {
  int64_t room;
  uint32_t *q_width, *q_length, *o_width, *o_length;  // q and the output's gradient, as pairs along both dimensions
  uint16_t *k_transposed;
  float *log_sum, *along, *grad_q, *grad_k, *grad_v;  // grad_q is (D, room); `along` is sum of out * grad_out of a query
  float *scores, *slopes;
  uint16_t *weights, *weight_slopes;
  uint32_t *slope_pairs;
};

// The keys `k0` onwards and queries `q0` onwards of one tile.
void backward_tile(const dsk_attention &a, int64_t b, Rows k, Rows v, int64_t k0, int64_t q0, const Backward &w) {
  int64_t keys = k0 + kTile < a.length ? kTile : a.length - k0, columns = q0 + kTile < w.room ? kTile : w.room - q0;
  int64_t width = a.width, even = up(keys, 2);
  multiply<false>(keys, columns, width / 2, k.row(k0), k.stride, w.q_width + q0, w.room, w.scores, kTile);
  multiply<false>(keys, columns, width / 2, v.row(k0), v.stride, w.o_width + q0, w.room, w.slopes, kTile);
  const __m512 scale = _mm512_set1_ps(a.scale);
  for (int64_t n = 0; n < columns / kLanes; n++) {
    int64_t at = q0 + n * kLanes;
    __m512 log_sum = _mm512_loadu_ps(w.log_sum + at), along = _mm512_loadu_ps(w.along + at);
    __mmask16 real = lanes_between(0, a.length - at);
    __m512i first = a.first ? _mm512_maskz_loadu_epi32(real, a.first + b * a.length + at) : _mm512_setzero_si512();
    for (int64_t j = 0; j < even; j += 2) {
      __m512 slope[2];
      for (int64_t r = 0; r < 2; r++) {
        int64_t key = k0 + j + r, place = (j + r) * kTile + n * kLanes;
        __mmask16 seen = real & lanes_between(key - at, kLanes) & _mm512_cmple_epi32_mask(first, _mm512_set1_epi32((int)key));
        if (j + r >= keys) seen = 0;
        __m512 score = _mm512_fmsub_ps(_mm512_loadu_ps(w.scores + place), scale, log_sum);
        __m512 weight = _mm512_maskz_mov_ps(seen, exponential(_mm512_mask_mov_ps(log_sum, seen, score)));
        slope[r] = _mm512_maskz_mul_ps(seen, weight, _mm512_sub_ps(_mm512_loadu_ps(w.slopes + place), along));
        store16(w.weights + place, weight);
        store16(w.weight_slopes + place, slope[r]);
      }
      // Pairs of two keys' numbers for the same query.
      __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(slope[0]));
      __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(slope[1])), 16);
      _mm512_storeu_si512(w.slope_pairs + j / 2 * kTile + n * kLanes, _mm512_or_si512(low, high));
    }
  }
  multiply<true>(keys, width, columns / 2, w.weights, kTile, w.o_length + q0 / 2 * width, width, w.grad_v + k0 * width, width);
  multiply<true>(keys, width, columns / 2, w.weight_slopes, kTile, w.q_length + q0 / 2 * width, width, w.grad_k + k0 * width, width);
  multiply<true>(width, columns, even / 2, w.k_transposed + k0, w.room, w.slope_pairs, kTile, w.grad_q + q0, w.room);
}

void backward_head(const dsk_attention &a, int64_t b, int64_t h, int64_t kh, const Backward &w) {
  Rows q = a.q.of(b, h), out = a.out.of(b, h), grad_out = a.grad_out.of(b, h), grad_q = a.grad_q.of(b, h);
  int64_t width = a.width, length = a.length;
  pairs_along_width(q, length, width, w.q_width, w.room);
  pairs_along_length(q, length, width, w.q_length, w.room);
  pairs_along_width(grad_out, length, width, w.o_width, w.room);
  pairs_along_length(grad_out, length, width, w.o_length, w.room);
  memset(w.grad_q, 0, width * w.room * sizeof(float));
  memcpy(w.log_sum, a.log_sum + (b * a.heads + h) * length, length * sizeof(float));
  for (int64_t t = 0; t < w.room; t++) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; t < length && d < width; d += kLanes)
      sum = _mm512_fmadd_ps(wide16(out.row(t) + d), wide16(grad_out.row(t) + d), sum);
    w.along[t] = _mm512_reduce_add_ps(sum);
    if (t >= length) w.log_sum[t] = 0.0f;
  }
  for (int64_t k0 = 0; k0 < length; k0 += kTile)
    for (int64_t q0 = k0; q0 < length; q0 += kTile)
      // `first` never falls: no later query sees these keys either.
      if (first_of(a, b, q0) >= k0 + kTile) break;
      else backward_tile(a, b, a.k.of(b, kh), a.v.of(b, kh), k0, q0, w);
  for (int64_t t = 0; t < w.room; t += kLanes)
    for (int64_t d = 0; d < width; d += kLanes) {
      __m512i square[kLanes];
      for (int64_t i = 0; i < kLanes; i++) square[i] = _mm512_loadu_si512(w.grad_q + (d + i) * w.room + t);
      transpose(square);
      for (int64_t i = 0; i < kLanes && t + i < length; i++)
        store16(grad_q.row(t + i) + d, _mm512_mul_ps((__m512)square[i], _mm512_set1_ps(a.scale)));
    }
}

void backward_heads(const dsk_attention &a, int64_t b, int64_t kh) {
  int64_t room = room_of(a.length), width = a.width, group = a.heads / a.key_heads;
  scratch.start(room * (width * (4 * 2 + 2 + 3 * 4) + 8) + kTile * kTile * (8 + 4 + 2) + 2048);
  Backward w;
  w.room = room;
  w.q_width = scratch.take<uint32_t>(room * width / 2), w.q_length = scratch.take<uint32_t>(room * width / 2);
  w.o_width = scratch.take<uint32_t>(room * width / 2), w.o_length = scratch.take<uint32_t>(room * width / 2);
  w.k_transposed = scratch.take<uint16_t>(room * width);
  w.log_sum = scratch.take<float>(room), w.along = scratch.take<float>(room);
  w.grad_q = scratch.take<float>(room * width);
  w.grad_k = scratch.take<float>(room * width), w.grad_v = scratch.take<float>(room * width);
  w.scores = scratch.take<float>(kTile * kTile), w.slopes = scratch.take<float>(kTile * kTile);
  w.weights = scratch.take<uint16_t>(kTile * kTile), w.weight_slopes = scratch.take<uint16_t>(kTile * kTile);
  w.slope_pairs = scratch.take<uint32_t>(kTile * kTile / 2);
  transposed(a.k.of(b, kh), a.length, width, w.k_transposed, room);
  memset(w.grad_k, 0, room * width * sizeof(float));
  memset(w.grad_v, 0, room * width * sizeof(float));
  for (int64_t h = kh * group; h < (kh + 1) * group; h++) backward_head(a, b, h, kh, w);
  Rows grad_k = a.grad_k.of(b, kh), grad_v = a.grad_v.of(b, kh);
  for (int64_t t = 0; t < a.length; t++)
    for (int64_t d = 0; d < width; d += kLanes) {
      __m512 k = _mm512_mul_ps(_mm512_loadu_ps(w.grad_k + t * width + d), _mm512_set1_ps(a.scale));
      store16(grad_k.row(t) + d, k);
      store16(grad_v.row(t) + d, _mm512_loadu_ps(w.grad_v + t * width + d));
    }
}

}  // namespace

extern "C" {

// `width` is a multiple of 16.
void dsk_attention_forward(const dsk_attention *a, int32_t threads) {
  int64_t parts = a->batches * a->key_heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t part = 0; part < parts; part++) forward_heads(*a, part / a->key_heads, part % a->key_heads);
}

void dsk_attention_backward(const dsk_attention *a, int32_t threads) {
  int64_t parts = a->batches * a->key_heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t part = 0; part < parts; part++) backward_heads(*a, part / a->key_heads, part % a->key_heads);
}
}
