// The C ABI of the CUDA build: launches on the stream that is given as an integer, and returns cudaGetLastError().
#include <cuda_runtime.h>

#include "kernels.cuh"

namespace {

constexpr int64_t kBlocks = 2048;  // enough for any device; more work strides

unsigned blocks_for(int64_t pieces) { return static_cast<unsigned>(pieces < 1 ? 1 : pieces < kBlocks ? pieces : kBlocks); }

template <int RULE, int DECAY>
void launch(const dsk_tensor *tensor, const dsk_tensor *list, const int64_t *chunks, int64_t count, int64_t all_chunks,
            const dsk_call &call, cudaStream_t stream) {
  if (list) {
    dsk_list<RULE, DECAY><<<blocks_for(all_chunks), kThreads, 0, stream>>>(list, chunks, count, call);
  } else {
    int64_t pieces = (tensor->n + kThreads * kVector - 1) / (kThreads * kVector);
    dsk_flat<RULE, DECAY><<<blocks_for(pieces), kThreads, 0, stream>>>(*tensor, call);
  }
}

int step(const dsk_tensor *tensor, const dsk_tensor *list, const int64_t *chunks, int64_t count, int64_t all_chunks,
         const dsk_args *args, const dsk_args *on_device, const int32_t *skip, uint64_t stream) {
  dsk_call call = {*args, on_device, skip};
  cudaStream_t where = reinterpret_cast<cudaStream_t>(stream);
  auto run = args->rule == DSK_ADAGRAD          ? (args->decay_kind == DSK_L2 ? launch<DSK_ADAGRAD, DSK_L2>
                                                                              : launch<DSK_ADAGRAD, DSK_NONE>)
             : args->decay_kind == DSK_L2        ? launch<DSK_ADAM, DSK_L2>
             : args->decay_kind == DSK_DECOUPLED ? launch<DSK_ADAM, DSK_DECOUPLED>
                                                 : launch<DSK_ADAM, DSK_NONE>;
  run(tensor, list, chunks, count, all_chunks, call, where);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

extern "C" {

// One tensor, described on the host. Rule and kind of decay are read from `args`, all else from `on_device` if given.
int dsk_cuda_step(const dsk_tensor *tensor, const dsk_args *args, const dsk_args *on_device, const int32_t *skip,
                  uint64_t stream) {
  return step(tensor, nullptr, nullptr, 1, 0, args, on_device, skip, stream);
}

// `count` tensors, described on the device; `chunks` as in kernels.cuh, `all_chunks` its last entry.
int dsk_cuda_step_list(const dsk_tensor *list, const int64_t *chunks, int64_t count, int64_t all_chunks,
                       const dsk_args *args, const dsk_args *on_device, const int32_t *skip, uint64_t stream) {
  return step(nullptr, list, chunks, count, all_chunks, args, on_device, skip, stream);
}

// `total`: sum of the squares of the tensors' `g`; `sums` has room for a double per chunk. All on the device.
int dsk_cuda_sum_of_squares(const dsk_tensor *list, const int64_t *chunks, int64_t count, int64_t all_chunks,
                            double *sums, double *total, int32_t *not_finite, uint64_t stream) {
  cudaStream_t where = reinterpret_cast<cudaStream_t>(stream);
  dsk_squares<<<blocks_for(all_chunks), kThreads, 0, where>>>(list, chunks, count, sums);
  dsk_total<<<1, 1, 0, where>>>(sums, all_chunks, total, not_finite);
  return static_cast<int>(cudaGetLastError());
}
}
