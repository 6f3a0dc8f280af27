// Rows over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace dimo::cpu {

// Runs a function on so many threads, the calling one among them, and returns when all are through.
using Team = void (*)(void (*run)(void*), void* data, unsigned threads, unsigned flags);

// The threads of the OpenMP runtime that torch has loaded: after each of torch's operators they spin for some
// milliseconds, in the way of any other thread. nullptr where there is none, and in a forked process, which has lost
// them.
Team waiting_team();

// Calls body(begin, end) over [0, rows) in tasks of rows_per_task, on at most num_threads threads, the calling one
// included; a single task runs there alone. body must not throw.
//
// Without a team threads live for one call: starting one costs some 20 us. Give a task enough work to pay for that.
template <class Body>
void parallel_rows(int64_t rows, int64_t rows_per_task, int num_threads, const Body& body) {
  const int64_t tasks = (rows + rows_per_task - 1) / rows_per_task;
  const int64_t helpers_wanted = std::min<int64_t>(num_threads, tasks) - 1;
  if (helpers_wanted < 1) return body(int64_t{0}, rows);

  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(rows_per_task, std::memory_order_relaxed)) < rows;)
      body(begin, std::min(begin + rows_per_task, rows));
  };
  if (const Team team = waiting_team()) {  // always as many, for a team that changes its size starts anew
    const auto run = [](void* data) { (*static_cast<decltype(work)*>(data))(); };
    return team(run, const_cast<void*>(static_cast<const void*>(&work)), static_cast<unsigned>(num_threads), 0);
  }
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<size_t>(helpers_wanted));
  try {
    for (int64_t i = 0; i < helpers_wanted; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // No further thread to be had: those that started and this one share the rows.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace dimo::cpu
