// In place of CUDA's header: csrc/cuda.cu becomes a library of the same C ABI that runs on the CPU. Grids and blocks are
// loops, threads of a block are fibers that take turns at barriers.
//
// Built by g++ with -fsanitize=undefined (cuda_on_cpu.py); tensors "on the device" are those of the host.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <ucontext.h>

#include <functional>
#include <vector>

struct Index {
  unsigned x;
};
static Index blockIdx, threadIdx, gridDim;

static std::vector<ucontext_t> fibers;
static ucontext_t scheduler;
static std::function<void()> body;
static double exchanged[1024];

// Hands over to the next thread of the block; the scheduler comes back here when all have had their turn.
static void yield_thread() {
  unsigned me = threadIdx.x;
  swapcontext(&fibers[me], &scheduler);
}

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __syncthreads() yield_thread()

static double __shfl_down_sync(unsigned, double value, int distance) {
  unsigned me = threadIdx.x;
  exchanged[me] = value;
  yield_thread();
  double other = (me & 31) + distance < 32 ? exchanged[me + distance] : value;
  yield_thread();
  return other;
}

static bool finished[1024];

static void run_fiber() {
  body();
  finished[threadIdx.x] = true;
  yield_thread();
}

static void run_grid(unsigned blocks, unsigned threads, std::function<void()> kernel) {
  constexpr size_t kStack = 64 * 1024;
  static std::vector<char> stacks(kStack * 1024);
  gridDim.x = blocks;
  body = kernel;
  fibers.resize(threads);
  for (unsigned block = 0; block < blocks; block++) {
    blockIdx.x = block;
    for (unsigned thread = 0; thread < threads; thread++) {
      getcontext(&fibers[thread]);
      fibers[thread].uc_stack.ss_sp = &stacks[kStack * thread];
      fibers[thread].uc_stack.ss_size = kStack;
      fibers[thread].uc_link = nullptr;
      makecontext(&fibers[thread], run_fiber, 0);
      finished[thread] = false;
    }
    for (bool running = true; running;) {
      running = false;
      for (unsigned thread = 0; thread < threads; thread++) {
        if (finished[thread]) continue;
        threadIdx.x = thread;
        swapcontext(&scheduler, &fibers[thread]);
        running = running || !finished[thread];
      }
    }
  }
}

// The kernel's name is an argument of its own, so that its parameters may hold commas.
#define DSK_LAUNCH(kernel, blocks, threads, stream, ...) run_grid(blocks, threads, [&] { kernel(__VA_ARGS__); })

typedef struct CUstream_st *cudaStream_t;
typedef int cudaError_t;
enum { cudaSuccess = 0 };
struct cudaFuncAttributes {};
template <class Kernel>
static int cudaFuncGetAttributes(cudaFuncAttributes *, Kernel kernel) { return kernel ? cudaSuccess : 98; }
static int cudaGetLastError() { return 0; }
static int cudaSetDevice(int device) { return device == 0 ? 0 : 101; }
static const char *cudaGetErrorString(int) { return "invalid device ordinal"; }
