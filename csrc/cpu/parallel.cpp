#include "cpu/parallel.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>

namespace dimo::cpu {
namespace {

std::atomic<bool> is_forked{false};
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

}  // namespace

Team waiting_team() {
  static const auto team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return is_forked ? nullptr : team;
}

}  // namespace dimo::cpu
#else
namespace dimo::cpu {

Team waiting_team() { return nullptr; }

}  // namespace dimo::cpu
#endif
