// CUDA bodies: a flat buffer, a list of tensors, and the norm. The arithmetic is opt_math.h's, bit for bit the CPU's.
//
// One launch strides over all elements, eight at a time with loads and stores of 16 bytes. Arguments may lie on the
// device and a flag there may turn the launch into nothing, so that a step can be captured and waits for no host.
#pragma once

#include "opt_math.h"

constexpr int kThreads = 256;
constexpr int kVector = 8;              // elements a thread works on at once
constexpr int64_t kListChunk = 16384;   // elements of a tensor that a block takes at a time
static_assert(kThreads == DSK_NORM_LANES, "a thread keeps one sum of a norm's block");

struct alignas(16) dsk_quad {
  uint32_t word[4];
};

// Where a launch finds what it does: the arguments by value, or on the device; `skip` may be null.
struct dsk_call {
  dsk_args args;
  const dsk_args *on_device;
  const int32_t *skip;
};

__device__ __forceinline__ float dsk_word_as_float(uint32_t bits) {
  dsk_word word;
  word.u = bits;
  return word.f;
}

__device__ __forceinline__ uint32_t dsk_float_as_word(float value) {
  dsk_word word;
  word.f = value;
  return word.u;
}

__device__ __forceinline__ float dsk_narrow_to_float(uint16_t bits, int32_t type) {
  return type == DSK_BF16 ? dsk_from_bf16(bits) : dsk_from_f16(bits);
}

__device__ __forceinline__ uint16_t dsk_float_to_narrow(float value, int32_t type) {
  return type == DSK_BF16 ? dsk_to_bf16(value) : dsk_to_f16(value);
}

__device__ __forceinline__ void dsk_load8(const void *from, int32_t type, int64_t at, float *out) {
  if (type == DSK_F32) {
    const dsk_quad *quads = reinterpret_cast<const dsk_quad *>(static_cast<const float *>(from) + at);
    dsk_quad low = quads[0], high = quads[1];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      out[i] = dsk_word_as_float(low.word[i]);
      out[i + 4] = dsk_word_as_float(high.word[i]);
    }
  } else {
    dsk_quad quad = *reinterpret_cast<const dsk_quad *>(static_cast<const uint16_t *>(from) + at);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      out[2 * i] = dsk_narrow_to_float(static_cast<uint16_t>(quad.word[i] & 0xFFFFu), type);
      out[2 * i + 1] = dsk_narrow_to_float(static_cast<uint16_t>(quad.word[i] >> 16), type);
    }
  }
}

__device__ __forceinline__ void dsk_store8(const float *values, void *to, int32_t type, int64_t at) {
  if (type == DSK_F32) {
    dsk_quad *quads = reinterpret_cast<dsk_quad *>(static_cast<float *>(to) + at);
    dsk_quad low, high;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      low.word[i] = dsk_float_as_word(values[i]);
      high.word[i] = dsk_float_as_word(values[i + 4]);
    }
    quads[0] = low;
    quads[1] = high;
  } else {
    dsk_quad quad;
#pragma unroll
    for (int i = 0; i < 4; i++)
      quad.word[i] = static_cast<uint32_t>(dsk_float_to_narrow(values[2 * i], type)) |
                     static_cast<uint32_t>(dsk_float_to_narrow(values[2 * i + 1], type)) << 16;
    *reinterpret_cast<dsk_quad *>(static_cast<uint16_t *>(to) + at) = quad;
  }
}

__device__ __forceinline__ void dsk_store8_stochastic(const float *values, void *to, int64_t at, uint64_t seed,
                                                      int64_t first) {
  uint16_t *bits = static_cast<uint16_t *>(to) + at;
#pragma unroll
  for (int i = 0; i < kVector; i++)
    bits[i] = dsk_to_bf16_stochastic(values[i], dsk_random(seed, static_cast<uint64_t>(first + at + i)));
}

__device__ __forceinline__ float dsk_load1(const void *from, int32_t type, int64_t at) {
  return type == DSK_F32 ? static_cast<const float *>(from)[at]
                         : dsk_narrow_to_float(static_cast<const uint16_t *>(from)[at], type);
}

__device__ __forceinline__ void dsk_store1(float value, void *to, int32_t type, int64_t at) {
  if (type == DSK_F32)
    static_cast<float *>(to)[at] = value;
  else
    static_cast<uint16_t *>(to)[at] = dsk_float_to_narrow(value, type);
}

template <int RULE, int DECAY>
__device__ __forceinline__ void dsk_element(const dsk_args &a, float &p, float g, float &m, float &v) {
  if (RULE == DSK_ADAM)
    dsk_adam<DECAY>(a, p, g, m, v);
  else
    dsk_adagrad<DECAY>(a, p, g, v);
}

// Elements `at` to `at + 8` of a tensor whose memory is aligned to 16 bytes.
template <int RULE, int DECAY>
__device__ __forceinline__ void dsk_update8(const dsk_tensor &t, const dsk_args &a, int64_t at) {
  float p[kVector], g[kVector], m[kVector] = {0}, v[kVector];
  dsk_load8(t.p, t.p_type, at, p);
  dsk_load8(t.g, t.g_type, at, g);
  dsk_load8(t.v, t.state_type, at, v);
  if (RULE == DSK_ADAM) dsk_load8(t.m, t.state_type, at, m);
#pragma unroll
  for (int i = 0; i < kVector; i++) dsk_element<RULE, DECAY>(a, p[i], g[i], m[i], v[i]);
  if (RULE == DSK_ADAM) dsk_store8(m, t.m, t.state_type, at);
  dsk_store8(v, t.v, t.state_type, at);
  if (a.stochastic && t.p_type == DSK_BF16)
    dsk_store8_stochastic(p, t.p, at, a.seed, t.first);
  else
    dsk_store8(p, t.p, t.p_type, at);
  if (t.copy) dsk_store8(p, t.copy, t.copy_type, at);
}

template <int RULE, int DECAY>
__device__ __forceinline__ void dsk_update1(const dsk_tensor &t, const dsk_args &a, int64_t at) {
  float p = dsk_load1(t.p, t.p_type, at), g = dsk_load1(t.g, t.g_type, at), m = 0;
  float v = dsk_load1(t.v, t.state_type, at);
  if (RULE == DSK_ADAM) m = dsk_load1(t.m, t.state_type, at);
  dsk_element<RULE, DECAY>(a, p, g, m, v);
  if (RULE == DSK_ADAM) dsk_store1(m, t.m, t.state_type, at);
  dsk_store1(v, t.v, t.state_type, at);
  if (a.stochastic && t.p_type == DSK_BF16)
    static_cast<uint16_t *>(t.p)[at] =
        dsk_to_bf16_stochastic(p, dsk_random(a.seed, static_cast<uint64_t>(t.first + at)));
  else
    dsk_store1(p, t.p, t.p_type, at);
  if (t.copy) dsk_store1(p, t.copy, t.copy_type, at);
}

__device__ __forceinline__ bool dsk_aligned(const dsk_tensor &t) {
  uintptr_t places = reinterpret_cast<uintptr_t>(t.p) | reinterpret_cast<uintptr_t>(t.g) |
                     reinterpret_cast<uintptr_t>(t.m) | reinterpret_cast<uintptr_t>(t.v) |
                     reinterpret_cast<uintptr_t>(t.copy);
  return (places & 15u) == 0;
}

// Elements `from` to `to` of a tensor by `threads` threads, of which this is number `thread`.
template <int RULE, int DECAY>
__device__ __forceinline__ void dsk_update_range(const dsk_tensor &t, const dsk_args &a, int64_t from, int64_t to,
                                                 int64_t thread, int64_t threads) {
  int64_t whole = dsk_aligned(t) ? from + (to - from) / kVector * kVector : from;
  for (int64_t at = from + thread * kVector; at < whole; at += threads * kVector) dsk_update8<RULE, DECAY>(t, a, at);
  for (int64_t at = whole + thread; at < to; at += threads) dsk_update1<RULE, DECAY>(t, a, at);
}

template <int RULE, int DECAY>
__global__ void __launch_bounds__(kThreads, 4) dsk_flat(dsk_tensor t, dsk_call call) {
  if (call.skip && *call.skip) return;
  const dsk_args a = call.on_device ? *call.on_device : call.args;
  dsk_update_range<RULE, DECAY>(t, a, 0, t.n, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                                static_cast<int64_t>(gridDim.x) * kThreads);
}

// `chunks[k]` is the number of chunks before tensor k, `chunks[count]` that of all.
__device__ __forceinline__ int64_t dsk_tensor_of(const int64_t *chunks, int64_t count, int64_t chunk) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    if (chunks[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

template <int RULE, int DECAY>
__global__ void __launch_bounds__(kThreads, 4)
    dsk_list(const dsk_tensor *tensors, const int64_t *chunks, int64_t count, dsk_call call) {
  if (call.skip && *call.skip) return;
  const dsk_args a = call.on_device ? *call.on_device : call.args;
  for (int64_t chunk = blockIdx.x; chunk < chunks[count]; chunk += gridDim.x) {
    int64_t k = dsk_tensor_of(chunks, count, chunk);
    const dsk_tensor t = tensors[k];
    int64_t from = (chunk - chunks[k]) * kListChunk;
    int64_t to = from + kListChunk < t.n ? from + kListChunk : t.n;
    dsk_update_range<RULE, DECAY>(t, a, from, to, threadIdx.x, kThreads);
  }
}

// The arguments of the next step, whose count, learning rate and factor lie on the device (`lr` and `factor` may be
// null). A step that is skipped isn't counted.
__global__ void dsk_prepare(dsk_rates rates, float *step, const float *lr, const float *factor, const int32_t *skip,
                            dsk_args *args) {
  if (skip && *skip) return;
  *step += 1.0f;
  *args = dsk_arguments(rates, lr ? *lr : rates.lr, *step, factor ? *factor : 1.0);
}

// The sum of a block's lanes in halves, at thread 0.
__device__ __forceinline__ double dsk_in_halves(double *lanes, double sum) {
  lanes[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half >= 32; half /= 2) {
    if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
    __syncthreads();
  }
  sum = lanes[threadIdx.x & 31];
  for (int half = 16; half > 0; half /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, half);
  __syncthreads();
  return sum;
}

// Sums of the squares of each block of DSK_NORM_BLOCK elements of the tensors' `g`.
__global__ void __launch_bounds__(kThreads, 4)
    dsk_squares(const dsk_tensor *tensors, const int64_t *chunks, int64_t count, double *sums) {
  static_assert(kListChunk == DSK_NORM_BLOCK, "a chunk of the list is a block of the norm");
  __shared__ double lanes[kThreads];
  for (int64_t chunk = blockIdx.x; chunk < chunks[count]; chunk += gridDim.x) {
    int64_t k = dsk_tensor_of(chunks, count, chunk);
    int64_t from = (chunk - chunks[k]) * kListChunk;
    int64_t to = from + kListChunk < tensors[k].n ? from + kListChunk : tensors[k].n;
    double sum = 0;
    for (int64_t at = from + threadIdx.x; at < to; at += kThreads)
      sum = dsk_add_square(sum, dsk_load1(tensors[k].g, tensors[k].g_type, at));
    sum = dsk_in_halves(lanes, sum);
    if (threadIdx.x == 0) sums[chunk] = sum;
  }
}

// One block: the sum of all blocks' sums, and whether it isn't finite.
__global__ void __launch_bounds__(kThreads, 4)
    dsk_total(const double *sums, int64_t count, double *total, int32_t *not_finite) {
  __shared__ double lanes[kThreads];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += sums[i];
  sum = dsk_in_halves(lanes, sum);
  if (threadIdx.x == 0) {
    *total = sum;
    *not_finite = !(sum - sum == 0);
  }
}
