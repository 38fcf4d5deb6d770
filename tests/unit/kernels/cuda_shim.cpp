// The CUDA bodies on the CPU: grids and blocks are loops, threads of a block are fibers that take turns at barriers.
//
// Built with -DSHIM and -fsanitize=undefined by test_cuda_bodies.py, which compares the results with the CPU build's.
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

#include "kernels.cuh"

static bool finished[1024];

static void run_fiber() {
  body();
  finished[threadIdx.x] = true;
  yield_thread();
}

static void launch(unsigned blocks, unsigned threads, std::function<void()> kernel) {
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

template <int RULE, int DECAY>
static void flat_or_list(const dsk_tensor *list, const int64_t *chunks, int64_t count, const dsk_call &call) {
  if (count == 1)
    launch(3, kThreads, [&] { dsk_flat<RULE, DECAY>(list[0], call); });
  else
    launch(3, kThreads, [&] { dsk_list<RULE, DECAY>(list, chunks, count, call); });
}

extern "C" void shim_step(const dsk_tensor *list, const int64_t *chunks, int64_t count, const dsk_args *args,
                          const dsk_args *on_device, const int32_t *skip) {
  dsk_call call = {*args, on_device, skip};
  auto run = args->rule == DSK_ADAGRAD          ? (args->decay_kind == DSK_L2 ? flat_or_list<DSK_ADAGRAD, DSK_L2>
                                                                              : flat_or_list<DSK_ADAGRAD, DSK_NONE>)
             : args->decay_kind == DSK_L2        ? flat_or_list<DSK_ADAM, DSK_L2>
             : args->decay_kind == DSK_DECOUPLED ? flat_or_list<DSK_ADAM, DSK_DECOUPLED>
                                                 : flat_or_list<DSK_ADAM, DSK_NONE>;
  run(list, chunks, count, call);
}

extern "C" double shim_sum_of_squares(const dsk_tensor *list, const int64_t *chunks, int64_t count,
                                      int32_t *not_finite) {
  std::vector<double> sums(chunks[count] + 1);
  double total = 0;
  launch(3, kThreads, [&] { dsk_squares(list, chunks, count, sums.data()); });
  launch(1, 1, [&] { dsk_total(sums.data(), chunks[count], &total, not_finite); });
  return total;
}
