// Runs tasks on XLA's thread pool. The calling thread may itself belong to the pool: it takes part
// in the work, and then waits only for tasks that another thread has already begun.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace block_sparse {

template <class Task>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t tasks, const Task& task) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  const Task* body =
      &task;  // valid until every task is done; a worker that starts later finds no task
  auto work = [shared, tasks, body] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < tasks;) {
      (*body)(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), tasks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  while (shared->done.load(std::memory_order_acquire) < tasks) std::this_thread::yield();
}

}  // namespace block_sparse
