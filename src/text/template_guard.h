// What keeps a hostile Jinja template or JSON argument from exhausting the stack, the memory or the clock: the
// interpreter behind this room has no limits of its own (range(1e12), a macro that calls itself, a million brackets).
// Threads: free functions, any number of threads. Owns: nothing. Fails how: a Status that says what was exceeded.
#pragma once

#include <cstddef>
#include <functional>
#include <string_view>

#include "base/status.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define JOINTKV_SHADOW_MEMORY 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define JOINTKV_SHADOW_MEMORY 1
#endif
#endif

namespace jointkv::text {

// A sanitizer's shadow memory needs the whole address space, so there the child's time alone is limited.
#ifdef JOINTKV_SHADOW_MEMORY
inline constexpr bool kLimitsChildMemory = false;
#else
inline constexpr bool kLimitsChildMemory = true;
#endif

// Size, tag length and nesting of a template, before it is parsed (the parser recurses).
Status CheckTemplateShape(std::string_view source);

// Nesting of a JSON text, before it is parsed.
inline constexpr size_t kJsonDepthMax = 64;
Status CheckJsonDepth(std::string_view json, std::string_view what, size_t limit = kJsonDepthMax);

// Runs `work` in a child process under limits of time and memory first: fails when the child crashed or ran out of
// either. What `work` returns or throws is not of interest. Where the system allows no child, answers Ok.
Status TryInChild(const std::function<void()>& work);

}  // namespace jointkv::text
