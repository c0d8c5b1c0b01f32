// Thread blocks on a CPU: every CUDA thread is a coroutine, switched at barriers, votes and shuffles, in an order drawn
// at random, so that an access which no barrier orders shows sooner or later. What csrc/cuda/block.cuh is to a GPU.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cuda/cluster.cuh"

namespace emulated {

using namespace fastpref::cuda;

class Threads {
 public:
  // Every other seed lets a warp run as far ahead of the others as barriers allow.
  explicit Threads(unsigned seed) : random_(seed), eager_(seed % 2) {}

  void run(int count, const std::function<void(int)>& body) {
    body_ = &body;
    all_.clear();
    for (int i = 0; i < count; ++i) all_.push_back(std::make_unique<Thread>(this, stack(i)));
    std::vector<int> order(count);
    for (int i = 0; i < count; ++i) order[i] = i;
    wake(order);
    finished_ = 0;
    while (finished_ < count) {
      if (ready_.empty()) std::fprintf(stderr, "emulated threads wait for each other\n"), std::abort();
      current_ = ready_.front();
      ready_.pop_front();
      Thread& next = *all_[current_];
      if (!_setjmp(scheduler_)) {
        if (next.started) _longjmp(next.state, 1);
        next.started = true;
        setcontext(&next.first);
      }
      finished_ += all_[current_]->done;
    }
  }

  void wait() {  // until somebody wakes this thread
    if (!_setjmp(all_[current_]->state)) _longjmp(scheduler_, 1);
  }
  void wake(std::vector<int>& threads) {
    std::shuffle(threads.begin(), threads.end(), random_);
    ready_.insert(eager_ ? ready_.begin() : ready_.end(), threads.begin(), threads.end());
    threads.clear();
  }
  int current() const { return current_; }

 private:
  static constexpr size_t kStack = 64 * 1024;
  struct Thread {
    ucontext_t first;
    jmp_buf state;
    bool started = false, done = false;
    Thread(Threads* owner, void* stack) {
      getcontext(&first);
      first.uc_stack.ss_sp = stack;
      first.uc_stack.ss_size = kStack;
      first.uc_link = nullptr;
      const auto address = reinterpret_cast<uintptr_t>(owner);
      makecontext(&first, reinterpret_cast<void (*)()>(&enter), 2, unsigned(address), unsigned(address >> 32));
    }
  };
  static void* stack(int thread) {  // kept from row to row
    static std::vector<void*> stacks;
    while (int(stacks.size()) <= thread) {
      stacks.push_back(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      if (stacks.back() == MAP_FAILED) std::abort();
    }
    return stacks[thread];
  }
  static void enter(unsigned low, unsigned high) {
    auto* owner = reinterpret_cast<Threads*>(uintptr_t(low) | uintptr_t(high) << 32);
    (*owner->body_)(owner->current_);
    owner->all_[owner->current_]->done = true;
    _longjmp(owner->scheduler_, 1);
  }

  std::mt19937 random_;
  const bool eager_;
  const std::function<void(int)>* body_;
  std::vector<std::unique_ptr<Thread>> all_;
  std::deque<int> ready_;
  jmp_buf scheduler_;
  int current_ = 0, finished_ = 0;
};

class Barrier {
 public:
  void init(Threads* threads, int count) { threads_ = threads, count_ = count; }
  bool wait(bool x = false) {  // the OR of what all threads bring
    any_ |= x;
    if (int(waiting_.size()) + 1 == count_) {
      result_ = any_, any_ = false;
      threads_->wake(waiting_);
      return result_;
    }
    waiting_.push_back(threads_->current());
    threads_->wait();
    return result_;
  }

 private:
  Threads* threads_;
  int count_;
  std::vector<int> waiting_;
  bool any_ = false, result_ = false;
};

struct BlockState {
  ClusterShared shared;
  std::vector<uint4> slice;
  Barrier all, warps[kWarps];
  uint64_t slots[kWarps][kLanes];
};

struct Block {
  std::vector<BlockState>& blocks;
  Barrier& cluster;
  int rank, ranks;
  ClusterShared& shared;
  uint4* slice;
  int thread, lane, warp;
  bool synced = false;
  std::vector<std::pair<uint4*, const uint4*>> copies;

  Block(std::vector<BlockState>& blocks, Barrier& cluster, int index)
      : blocks(blocks), cluster(cluster), rank(index / kThreads), ranks(int(blocks.size())),
        shared(blocks[rank].shared), slice(blocks[rank].slice.data()), thread(index % kThreads), lane(thread % kLanes),
        warp(thread / kLanes) {}

  void sync() { blocks[rank].all.wait(); }
  bool sync_or(bool x) { return blocks[rank].all.wait(x); }
  void sync_warp() { blocks[rank].warps[warp].wait(); }
  bool any_in_warp(bool x) { return blocks[rank].warps[warp].wait(x); }
  template <class X>
  X shuffle_xor(X x, int lanes) {
    std::memcpy(&blocks[rank].slots[warp][lane], &x, sizeof x);
    sync_warp();
    std::memcpy(&x, &blocks[rank].slots[warp][lane ^ lanes], sizeof x);
    sync_warp();
    return x;
  }

  void sync_cluster() { cluster.wait(), synced = true; }
  ClusterShared& remote(int other) {
    if (!synced) std::fprintf(stderr, "a block of the cluster may not have started yet\n"), std::abort();
    return blocks[other].shared;
  }
  void copy_async(uint4* to, const uint4* from) { copies.push_back({to, from}); }  // no sooner than waited for
  void wait_copies() {
    for (auto [to, from] : copies) *to = *from;
    copies.clear();
  }
};

// One row: body(block) on every thread of `ranks` blocks, whose shared memory holds anything but zeros.
template <class Body>
void run_row(int ranks, size_t slice, unsigned seed, const Body& body) {
  Threads threads(seed);
  std::vector<BlockState> blocks(ranks);
  Barrier cluster;
  cluster.init(&threads, ranks * kThreads);
  for (BlockState& block : blocks) {
    std::memset(static_cast<void*>(&block.shared), 0xff, sizeof block.shared);  // NaN
    block.slice.assign(slice, uint4{~0u, ~0u, ~0u, ~0u});
    block.all.init(&threads, kThreads);
    for (Barrier& warp : block.warps) warp.init(&threads, kLanes);
  }
  threads.run(ranks * kThreads, [&](int index) {
    Block block(blocks, cluster, index);
    body(block);
  });
}

}  // namespace emulated
