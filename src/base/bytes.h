// Byte counts as people write and read them: "512M", "2G", "1.5 GiB".
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/status.h"

namespace jointkv {

// Accepts digits with an optional fraction and an optional suffix K, M, G or T (powers of 1024; "KiB", "MB" and lower
// case too). Fails with kInvalidArgument on anything else and kOutOfRange past 2^62.
Expected<size_t> ParseBytes(std::string_view text);

// "134.0 MiB"
std::string FormatBytes(size_t bytes);

// Memory that this process could take without swapping, in bytes: what the machine has left (MemAvailable), or its
// control groups if that is less; 0 when unknown.
size_t AvailableMemoryBytes();

// The least that control groups (version 2) leave of their memory.max, from the process's group up to the root, in
// bytes; SIZE_MAX where none has a limit. root: where they are mounted; membership: a file as /proc/self/cgroup.
size_t ControlGroupBytesLeft(const std::string& root, const std::string& membership);

// This process's resident set, in bytes; 0 when unknown.
size_t ResidentBytes();

}  // namespace jointkv
