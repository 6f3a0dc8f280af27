// The part of selftest.cu that is about clusters, mailboxes and asynchronous copies.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/hopper.h"
#include "cuda/launch.h"

namespace dimo::cuda {
namespace {

constexpr unsigned kThreads = 64, kMostBlocks = 16;

// --- what works ---------------------------------------------------------------------------------------------------

// Every block writes to all of its cluster, and says what came.
struct Inbox {
  Mailbox mailbox;
  float board[kMostBlocks];
};

template <class Send>
__device__ void exchange(const float* in, float* out, int bytes, const Send& send) {
  Inbox& inbox = *shared_memory<Inbox>();
  if (threadIdx.x == 0) inbox.mailbox.open();
  cluster_sync();
  if (threadIdx.x == 0) inbox.mailbox.expect(bytes);
  if (threadIdx.x < cluster_size()) send(inbox, threadIdx.x, in[blockIdx.x]);
  inbox.mailbox.wait(0);
  if (threadIdx.x < cluster_size()) out[blockIdx.x * cluster_size() + threadIdx.x] = inbox.board[threadIdx.x];
  cluster_sync();
}

__device__ void send_own(Inbox& inbox, unsigned rank, float own) {
  inbox.mailbox.send(&inbox.board[cluster_rank()], rank, own);
}

__global__ void exchange_kernel(const float* in, float* out) {
  exchange(in, out, static_cast<int>(cluster_size() * sizeof(float)), send_own);
}

// Static shared memory is each block's own.
__global__ void keep_kernel(const float* in, float* out) {
  __shared__ float own;
  if (threadIdx.x == 0) own = in[blockIdx.x];
  cluster_sync();
  if (threadIdx.x < cluster_size()) out[blockIdx.x * cluster_size() + threadIdx.x] = own;
}

struct Parcel {
  uint4 cells[kThreads / 8];
  Mailbox mailbox;
};

// Half of the numbers, through shared memory.
template <bool kMailbox, bool kWait>
__global__ void copy_kernel(const float* in, float* out) {
  Parcel& parcel = *shared_memory<Parcel>();
  if (threadIdx.x == 0) parcel.mailbox.open();
  __syncthreads();
  if (kMailbox && threadIdx.x == 0) {
    parcel.mailbox.expect(sizeof parcel.cells);
    parcel.mailbox.copy(parcel.cells, in, sizeof parcel.cells);
  } else if (!kMailbox && threadIdx.x < kThreads / 8) {
    copy_async(&parcel.cells[threadIdx.x], in + 4 * threadIdx.x);
  }
  if (kMailbox && kWait) parcel.mailbox.wait(0);
  if (!kMailbox && kWait) wait_for_copies();
  __syncthreads();
  if (threadIdx.x < kThreads / 2) out[threadIdx.x] = reinterpret_cast<const float*>(parcel.cells)[threadIdx.x];
  if (kMailbox && !kWait) parcel.mailbox.wait(0);
}

// --- what is caught -----------------------------------------------------------------------------------------------

constexpr int kTwoNumbers = 2 * sizeof(float);  // what a block of two gets

__global__ void wrong_rank(const float* in, float* out) {
  exchange(in, out, kTwoNumbers, [](Inbox& inbox, unsigned, float own) { send_own(inbox, 0, own); });
}

__global__ void absent_rank(const float* in, float* out) {
  exchange(in, out, kTwoNumbers, [](Inbox& inbox, unsigned rank, float own) { send_own(inbox, rank + 1, own); });
}

__global__ void too_many_bytes(const float* in, float* out) { exchange(in, out, kTwoNumbers + 4, send_own); }

__global__ void too_few_bytes(const float* in, float* out) { exchange(in, out, kTwoNumbers - 4, send_own); }

__global__ void foreign_address(const float* in, float* out) {
  exchange(in, out, kTwoNumbers, [=](Inbox& inbox, unsigned rank, float own) { inbox.mailbox.send(out, rank, own); });
}

// The second block leaves, whatever the first sends.
__global__ void dropped_cluster_sync(const float* in, float*) {
  Inbox& inbox = *shared_memory<Inbox>();
  if (threadIdx.x == 0) inbox.mailbox.open();
  cluster_sync();
  if (cluster_rank() == 0 && threadIdx.x == 0) inbox.mailbox.send(&inbox.board[0], 1, in[0]);
}

__global__ void lonely_cluster_sync(const float*, float*) {
  if (cluster_rank() == 0) cluster_sync();
}

__global__ void closed_mailbox(const float* in, float*) {
  Inbox& inbox = *shared_memory<Inbox>();
  if (cluster_rank() == 0 && threadIdx.x == 0) inbox.mailbox.open();
  cluster_sync();
  if (threadIdx.x == 0) inbox.mailbox.send(&inbox.board[0], 1, in[0]);
  cluster_sync();
}

__global__ void misaligned_copy(const float* in, float*) { copy_async(shared_memory<uint4>(), in + 1); }

// A second number goes where the first may not have been read yet.
__global__ void hasty_message(const float* in, float* out) {
  Inbox& inbox = *shared_memory<Inbox>();
  if (threadIdx.x == 0) inbox.mailbox.open();
  cluster_sync();
  for (int phase = 0; phase < 2; ++phase) {
    if (threadIdx.x == 0) inbox.mailbox.expect(kTwoNumbers);
    if (threadIdx.x < 2) send_own(inbox, threadIdx.x, in[phase]);
    inbox.mailbox.wait(phase);
    if (threadIdx.x == 2) out[2 * blockIdx.x + phase] = inbox.board[1 - cluster_rank()];
  }
  cluster_sync();
}

}  // namespace
}  // namespace dimo::cuda
