// Options of `bench serve`.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include "cli/bench_serve_dataset.h"
#include "cli/bench_serve_http.h"
#include "cli/bench_serve_load.h"
#include "cli/bench_serve_stats.h"

namespace jointkv::cli {

struct ServeFlags {
  std::string backend = "openai";
  std::string base_url;  // in place of host and port
  TlsCheck tls_check = TlsCheck::kCertificate;
  std::string host = "127.0.0.1";
  int port = 8000;
  std::string endpoint;
  HttpHeaders headers;
  std::string request_id_prefix;
  int ready_check_timeout_s = 0;
  double request_timeout_s = 6 * 3600;

  DatasetOptions dataset;
  std::string save_dataset_path;  // write the requests there and send none
  BodyOptions body;
  ArrivalOptions arrival;
  std::optional<size_t> max_concurrency;
  size_t num_warmups = 0;
  bool disable_progress = false;

  ServeStatsOptions stats;
  std::string label;
  std::vector<std::pair<std::string, std::string>> metadata;
  bool save_result = false;
  bool append_result = false;
  std::string result_dir;
  std::string result_filename;
  std::vector<std::string> ignored;  // options given that do nothing without --save-result
};

// `flags` must outlive the parse. Takes the command's parse_complete_callback.
void AddServeFlags(CLI::App& app, ServeFlags& flags);

}  // namespace jointkv::cli
