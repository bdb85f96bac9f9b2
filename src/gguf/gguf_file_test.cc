#include "gguf/gguf_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>

#include "gguf/dequantize.h"
#include "gguf/gguf_writer_for_test.h"

namespace jointkv::gguf {
namespace {

using Writer = GgufWriter;

std::string Zeros(size_t bytes) { return std::string(bytes, '\0'); }

Writer GoodFile() {
  Writer w;
  w.AddString("general.architecture", "llama");
  w.AddU32("a.u32", 7);
  w.Add("a.u8", ValueType::kU8, Writer::Raw(uint8_t{200}));
  w.Add("a.i16", ValueType::kI16, Writer::Raw(int16_t{-5}));
  w.Add("a.u64", ValueType::kU64, Writer::Raw(uint64_t{1} << 40));
  w.Add("a.f64", ValueType::kF64, Writer::Raw(0.5));
  w.Add("a.f64.large", ValueType::kF64, Writer::Raw(1e300));
  w.AddF32("a.f32", 1.5f);
  w.AddBool("a.bool", true);
  w.AddStrings("a.strings", {"one", "", "three"});
  w.AddNumbers<int32_t>("a.i32s", ValueType::kI32, {1, -2, 3});
  w.AddNumbers<uint8_t>("a.bools", ValueType::kBool, {1, 0, 1});
  w.AddNumbers<float>("a.f32s", ValueType::kF32, {1, 2});
  w.AddTensorF32("x", {2, 3}, {1, 2, 3, 4, 5, 6});
  // Q8_0: a half-precision scale (0x3c00 = 1), then 32 signed bytes.
  std::string block = Writer::Raw(uint16_t{0x3c00});
  for (int i = 0; i < 32; ++i) block += static_cast<char>(i - 16);
  w.AddTensor({"q", {32, 2}, GGML_TYPE_Q8_0, block + block, {}, {}});
  return w;
}

Expected<GgufFile> OpenBytes(const std::string& bytes, const Limits& limits = {}) {
  const TempFile temp(bytes);
  return GgufFile::Open(temp.path(), limits);
}

TEST(GgufFileTest, ReadsMetadata) {
  const Expected<GgufFile> file = OpenBytes(GoodFile().Build());
  ASSERT_TRUE(file.ok()) << file.status().ToString();
  const GgufFile& f = *file;
  EXPECT_EQ(f.architecture(), "llama");
  EXPECT_EQ(f.version(), 3u);
  EXPECT_EQ(f.quantization(), "q8_0");
  EXPECT_EQ(f.file_bytes(), GoodFile().Build().size());
  EXPECT_EQ(f.GetU32("a.u32").value(), 7u);
  EXPECT_EQ(f.GetU32("a.u8").value(), 200u);
  EXPECT_EQ(f.GetF32("a.f64").value(), 0.5f);
  EXPECT_EQ(f.GetF32("a.f32").value(), 1.5f);
  EXPECT_TRUE(f.GetBool("a.bool").value());
  EXPECT_EQ(f.GetString("general.architecture").value(), "llama");
  EXPECT_EQ(f.StringArraySize("a.strings").value(), 3u);
  EXPECT_EQ(f.GetI32Array("a.i32s").value(), (std::vector<int32_t>{1, -2, 3}));
  EXPECT_EQ(f.GetBoolArray("a.bools").value(), (std::vector<bool>{true, false, true}));
  EXPECT_EQ(f.GetF32Array("a.f32s").value(), (std::vector<float>{1, 2}));
  EXPECT_TRUE(f.Has("a.f32s"));
  EXPECT_TRUE(f.IsArray("a.f32s"));
  EXPECT_FALSE(f.IsArray("a.f32"));
  EXPECT_FALSE(f.Has("b"));
}

TEST(GgufFileTest, GettersTellMissingFromWrong) {
  const Expected<GgufFile> file = OpenBytes(GoodFile().Build());
  ASSERT_TRUE(file.ok());
  const GgufFile& f = *file;
  EXPECT_EQ(f.GetU32("b").status().code(), StatusCode::kNotFound);
  EXPECT_NE(f.GetU32("b").status().message().find("'b' (an integer) is missing"), std::string::npos);
  EXPECT_EQ(f.GetU32("a.f32").status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(f.GetU32("a.f32").status().message().find("'a.f32' is of type f32, expected an integer"),
            std::string::npos);
  EXPECT_EQ(f.GetU32("a.i16").status().code(), StatusCode::kOutOfRange);
  EXPECT_EQ(f.GetU32("a.u64").status().code(), StatusCode::kOutOfRange);
  EXPECT_EQ(f.GetF32("a.f64.large").status().code(), StatusCode::kOutOfRange);
  EXPECT_EQ(f.GetU32Array("a.i32s").status().code(), StatusCode::kOutOfRange);
  EXPECT_EQ(f.GetF32("a.u32").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(f.GetBool("a.u8").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(f.GetString("a.u8").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(f.GetI32Array("a.f32s").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(f.GetI32Array("a.u32").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(f.GetF32Array("a.i32s").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(f.GetBoolArray("a.i32s").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(f.StringArraySize("a.i32s").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(f.GetU32("a.i32s").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(f.GetU32Or("b", 3).value(), 3u);
  EXPECT_EQ(f.GetU32Or("a.f32", 3).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(f.GetF32Or("b", 2.5f).value(), 2.5f);
  EXPECT_TRUE(f.GetBoolOr("b", true).value());
  EXPECT_EQ(f.GetStringOr("b", "z").value(), "z");
  EXPECT_EQ(f.GetStringOr("a.u32", "z").status().code(), StatusCode::kInvalidArgument);
}

TEST(GgufFileTest, TensorsSurviveMoves) {
  Expected<GgufFile> opened = OpenBytes(GoodFile().Build());
  ASSERT_TRUE(opened.ok());
  GgufFile first = std::move(opened).value();
  GgufFile f = std::move(first);
  ASSERT_EQ(f.tensors().size(), 2u);
  const Tensor* x = f.Find("x");
  ASSERT_NE(x, nullptr);
  EXPECT_EQ(f.Find("y"), nullptr);
  EXPECT_EQ(x->n_dims, 2);
  EXPECT_EQ(x->ne, (std::array<int64_t, 4>{2, 3, 1, 1}));
  EXPECT_EQ(x->size_bytes, 24u);

  std::vector<float> row(2);
  ASSERT_TRUE(Dequantize(*x, 1, 1, row.data()).ok());
  EXPECT_EQ(row, (std::vector<float>{3, 4}));
  std::vector<float> quantized(32);
  ASSERT_TRUE(Dequantize(*f.Find("q"), 1, 1, quantized.data()).ok());
  for (int i = 0; i < 32; ++i) EXPECT_EQ(quantized[static_cast<size_t>(i)], static_cast<float>(i - 16));

  EXPECT_TRUE(Dequantize(*x, 3, 0, nullptr).ok());
  EXPECT_EQ(Dequantize(*x, 2, 2, row.data()).code(), StatusCode::kOutOfRange);
  EXPECT_EQ(Dequantize(*x, -1, 1, row.data()).code(), StatusCode::kOutOfRange);
  EXPECT_EQ(Dequantize(*x, 0, -1, row.data()).code(), StatusCode::kOutOfRange);
  EXPECT_EQ(Dequantize(*x, std::numeric_limits<int64_t>::max(), 1, row.data()).code(), StatusCode::kOutOfRange);
}

TEST(GgufFileTest, ReadsVersion2AndOtherAlignments) {
  Writer w = GoodFile();
  w.version = 2;
  w.alignment = 64;
  w.AddU32("general.alignment", 64);
  const Expected<GgufFile> file = OpenBytes(w.Build());
  ASSERT_TRUE(file.ok()) << file.status().ToString();
  EXPECT_EQ(reinterpret_cast<uintptr_t>(file->Find("q")->data) % 64, 0u);
}

TEST(GgufFileTest, PathsThatAreNotFiles) {
  const auto open = [](const std::string& path) { return GgufFile::Open(path).status(); };
  EXPECT_EQ(open("/nonexistent/model.gguf").code(), StatusCode::kNotFound);
  EXPECT_EQ(open("").code(), StatusCode::kNotFound);
  EXPECT_EQ(open(std::string("a\0b", 3)).code(), StatusCode::kInvalidArgument);

  const Status folder = open("/");
  EXPECT_EQ(folder.code(), StatusCode::kIo);
  EXPECT_NE(folder.message().find("is a directory"), std::string::npos);

  const TempFile temp("GGUF");
  const std::string fifo = temp.path() + ".fifo";
  ASSERT_EQ(mkfifo(fifo.c_str(), 0600), 0);
  const Status pipe = open(fifo);
  unlink(fifo.c_str());
  EXPECT_EQ(pipe.code(), StatusCode::kIo);
  EXPECT_NE(pipe.message().find("not a regular file"), std::string::npos);

  const Status device = open("/dev/null");
  EXPECT_EQ(device.code(), StatusCode::kIo);

  if (geteuid() != 0) {  // root reads everything
    ASSERT_EQ(chmod(temp.path().c_str(), 0), 0);
    EXPECT_EQ(open(temp.path()).code(), StatusCode::kIo);
  }
}

struct BadFile {
  const char* name;
  std::function<std::string()> bytes;
  StatusCode code;
  const char* message;
};

// The good file after one change.
std::function<std::string()> With(const std::function<void(Writer&)>& change) {
  return [change] {
    Writer w = GoodFile();
    change(w);
    return w.Build();
  };
}

std::function<std::string()> WithTensor(const Writer::TensorSpec& tensor) {
  return With([tensor](Writer& w) { w.AddTensor(tensor); });
}

std::vector<BadFile> BadFiles() {
  using enum StatusCode;
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  const std::string f32s = Zeros(32);
  return {
      {"empty", [] { return std::string(); }, kDataLoss, "the file is empty"},
      {"magic cut", [] { return std::string("GGU"); }, kDataLoss, "truncated at byte 0: magic"},
      {"magic only", [] { return std::string("GGUF"); }, kDataLoss, "truncated at byte 4: version"},
      {"other magic", With([](Writer& w) { w.magic = "GGML"; }), kInvalidArgument,
       "starts with 'GGML', expected 'GGUF'"},
      {"binary magic", With([](Writer& w) {
         w.magic = std::string(
             "\x7f"
             "ELF");
       }),
       kInvalidArgument, "'\\x7fELF'"},
      {"version 0", With([](Writer& w) { w.version = 0; }), kUnsupported, "version 0, supported are 2 and 3"},
      {"version 1", With([](Writer& w) { w.version = 1; }), kUnsupported, "version 1"},
      {"version 4", With([](Writer& w) { w.version = 4; }), kUnsupported, "version 4"},
      {"big-endian", With([](Writer& w) { w.version = 0x03000000; }), kUnsupported, "big-endian"},
      {"counts cut", [] { return GoodFile().Build().substr(0, 12); }, kDataLoss, "truncated at byte 8: tensor count"},
      {"too many tensors", With([](Writer& w) { w.n_tensors = 1u << 20; }), kOutOfRange,
       "1048576 tensors, limit 65536"},
      {"negative tensors", With([](Writer& w) { w.n_tensors = ~uint64_t{0}; }), kOutOfRange,
       "18446744073709551615 tensors"},
      {"too many entries", With([](Writer& w) { w.n_entries = 5000; }), kOutOfRange,
       "5000 metadata entries, limit 4096"},
      {"one entry too few", With([](Writer& w) { w.n_entries = 12; }), kInvalidArgument, "dimensions, expected 1 to 4"},
      {"empty key", With([](Writer& w) { w.AddU32("", 1); }), kInvalidArgument, "has an empty key"},
      {"key too long", With([](Writer& w) { w.AddU32(std::string(70000, 'k'), 1); }), kOutOfRange,
       "70000 bytes, limit 65535"},
      {"key length wraps",
       [] {
         Writer w;
         w.n_entries = 1;
         return w.Header() + Writer::Raw(~uint64_t{0});
       },
       kOutOfRange, "key of metadata entry 0"},
      {"key past the end",
       [] {
         Writer w;
         w.n_entries = 1;
         return w.Header() + Writer::Raw(uint64_t{1000}) + "abc";
       },
       kDataLoss, "needs 1000 bytes, 3 left"},
      {"zero byte in key", With([](Writer& w) { w.AddU32(std::string("a\0b", 3), 1); }), kInvalidArgument,
       "'a\\x00b' holds a zero byte"},
      {"duplicate key", With([](Writer& w) { w.AddDuplicate("a.u32", 4, Writer::Raw(1)); }), kInvalidArgument,
       "'a.u32' appears twice"},
      {"unknown value type", With([](Writer& w) { w.Add("t", 13u, Zeros(8)); }), kInvalidArgument, "value type 13"},
      {"unknown element type",
       With([](Writer& w) { w.Add("t", 9u, Writer::Raw(99u) + Writer::Raw(uint64_t{1}) + Zeros(8)); }),
       kInvalidArgument, "value type 99"},
      {"nested array", With([](Writer& w) { w.Add("t", 9u, Writer::Raw(9u) + Writer::Raw(uint64_t{1}) + Zeros(16)); }),
       kUnsupported, "an array of arrays"},
      {"bool of 2", With([](Writer& w) { w.Add("t", ValueType::kBool, std::string(1, '\2')); }), kInvalidArgument,
       "bool stored as 2"},
      {"bool of 255 in array", With([](Writer& w) {
         w.AddNumbers<uint8_t>("t", ValueType::kBool, {0, 1, 255});
       }),
       kInvalidArgument, "bool stored as 255"},
      {"array too long", With([](Writer& w) { w.AddArray("t", ValueType::kU8, 1u << 25, ""); }), kOutOfRange,
       "33554432 elements, limit 16777216"},
      {"array count wraps", With([](Writer& w) { w.AddArray("t", ValueType::kU64, ~uint64_t{0} / 8 + 2, ""); }),
       kOutOfRange, "elements"},
      {"array past the end", With([](Writer& w) { w.AddArray("t", ValueType::kU64, 1000, ""); }), kDataLoss,
       "needs 8000 bytes"},
      {"string too long", With([](Writer& w) { w.Add("t", ValueType::kString, Writer::Raw(uint64_t{1} << 30)); }),
       kOutOfRange, "1073741824 bytes, limit 16777216"},
      {"string past the end", With([](Writer& w) { w.Add("t", ValueType::kString, Writer::Raw(uint64_t{5000})); }),
       kDataLoss, "value of key 't' needs 5000 bytes"},
      {"string array past the end",
       With([](Writer& w) { w.AddArray("t", ValueType::kString, 3, Writer::RawString("x")); }), kOutOfRange,
       "value of key 't'"},
      {"no architecture", With([](Writer& w) { w.Remove("general.architecture"); }), kNotFound,
       "'general.architecture'"},
      {"architecture of u32", With([](Writer& w) { w.AddU32("general.architecture", 1); }), kInvalidArgument,
       "is of type u32, expected string"},
      {"architecture as array", With([](Writer& w) { w.AddStrings("general.architecture", {"a"}); }), kInvalidArgument,
       "is an array of string"},
      {"split", With([](Writer& w) { w.Add("split.count", ValueType::kU16, Writer::Raw(uint16_t{3})); }), kUnsupported,
       "one of 3 parts"},
      {"split of string", With([](Writer& w) { w.AddString("split.count", "3"); }), kInvalidArgument,
       "'split.count' is of type string"},
      {"alignment 0", With([](Writer& w) { w.AddU32("general.alignment", 0); }), kInvalidArgument,
       "0 is not a power of two"},
      {"alignment 48", With([](Writer& w) { w.AddU32("general.alignment", 48); }), kInvalidArgument,
       "48 is not a power of two"},
      {"alignment 4", With([](Writer& w) { w.AddU32("general.alignment", 4); }), kOutOfRange,
       "general.alignment 4, limits 8 to 1048576"},
      {"alignment 2^31", With([](Writer& w) { w.AddU32("general.alignment", 1u << 31); }), kOutOfRange,
       "general.alignment 2147483648"},
      {"alignment of u64",
       With([](Writer& w) { w.Add("general.alignment", ValueType::kU64, Writer::Raw(uint64_t{32})); }),
       kInvalidArgument, "is of type u64, expected u32"},
      {"empty tensor name", WithTensor({"", {8}, 0, f32s, {}, {}}), kInvalidArgument, "tensor 2 has an empty name"},
      {"tensor name too long", WithTensor({std::string(64, 'n'), {8}, 0, f32s, {}, {}}), kOutOfRange,
       "64 bytes, limit 63"},
      {"zero byte in tensor name", WithTensor({std::string("t\0x", 3), {8}, 0, f32s, {}, {}}), kInvalidArgument,
       "'t\\x00x'"},
      {"duplicate tensor", WithTensor({"x", {8}, 0, f32s, {}, {}}), kInvalidArgument, "tensor 'x' appears twice"},
      {"no dimensions", WithTensor({"t", {}, 0, f32s, {}, {}}), kInvalidArgument,
       "'t' has 0 dimensions, expected 1 to 4"},
      {"five dimensions", WithTensor({"t", {1, 1, 1, 1, 8}, 0, f32s, {}, {}}), kInvalidArgument,
       "'t' has 5 dimensions"},
      {"2^32-1 dimensions", WithTensor({"t", {8}, 0, f32s, ~uint32_t{0}, {}}), kInvalidArgument,
       "4294967295 dimensions"},
      {"dimension 0", WithTensor({"t", {8, 0}, 0, f32s, {}, {}}), kInvalidArgument,
       "dimension 1 is 0, expected at least 1"},
      {"negative dimension", WithTensor({"t", {-8}, 0, f32s, {}, {}}), kInvalidArgument, "dimension 0 is -8"},
      {"dimension too large", WithTensor({"t", {kHuge}, 0, f32s, {}, {}}), kOutOfRange, "limit 2147483648"},
      {"product overflows", WithTensor({"t", {1 << 30, 1 << 30, 1 << 30, 1 << 30}, 0, f32s, {}, {}}), kOutOfRange,
       "more than 17592186044416 elements"},
      {"unknown tensor type", WithTensor({"t", {8}, GGML_TYPE_COUNT, f32s, {}, {}}), kUnsupported,
       "the pinned ggml does not know"},
      {"negative tensor type", WithTensor({"t", {8}, -1, f32s, {}, {}}), kUnsupported, "tensor 't' has type -1"},
      {"removed tensor type", WithTensor({"t", {32}, 4, f32s, {}, {}}), kUnsupported, "tensor 't' has type 4"},
      {"integer tensor", WithTensor({"t", {8}, GGML_TYPE_I32, f32s, {}, {}}), kUnsupported,
       "type i32 (26), which cannot be turned"},
      {"row of half a block", WithTensor({"t", {16, 2}, GGML_TYPE_Q8_0, f32s, {}, {}}), kInvalidArgument,
       "'t' [16, 2]: a row is not a multiple of the 32"},
      {"misaligned offset", WithTensor({"t", {8}, 0, f32s, {}, 33}), kInvalidArgument,
       "offset 33 is not a multiple of the alignment 32"},
      {"offset past the end", WithTensor({"t", {8}, 0, f32s, {}, 1u << 20}), kDataLoss, "offset 1048576 of the data"},
      {"offset wraps", WithTensor({"t", {8}, 0, f32s, {}, ~uint64_t{31}}), kDataLoss, "pass the end of the file"},
      {"data cut", [] { return GoodFile().Build().substr(0, GoodFile().Build().size() - 1); }, kDataLoss,
       "pass the end of the file"},
      {"no data", [] { return GoodFile().Header(); }, kDataLoss, "pass the end of the file"},
      {"larger than the file", WithTensor({"t", {1 << 20, 1 << 20}, 0, f32s, {}, {}}), kDataLoss,
       "4398046511104 bytes at offset"},
      {"overlap", WithTensor({"t", {8}, 0, f32s, {}, 0}), kDataLoss, "overlap at offset"},
      {"partial overlap", WithTensor({"t", {8}, 0, f32s, {}, 64}), kDataLoss, "tensors 'q' and 't' overlap"},
      {"control bytes stay out of messages", WithTensor({"t\n\x1b[31m", {}, 0, f32s, {}, {}}), kInvalidArgument,
       "'t\\x0a\\x1b[31m'"},
  };
}

TEST(GgufFileTest, BadFilesSayWhatIsWrong) {
  const std::vector<BadFile> files = BadFiles();
  EXPECT_GE(files.size(), 40u);
  for (const BadFile& bad : files) {
    SCOPED_TRACE(bad.name);
    const Status status = OpenBytes(bad.bytes()).status();
    EXPECT_EQ(StatusCodeName(status.code()), std::string(StatusCodeName(bad.code))) << status.message();
    EXPECT_NE(status.message().find(bad.message), std::string::npos) << status.message();
    EXPECT_NE(status.message().find("gguf: "), std::string::npos);
  }
}

TEST(GgufFileTest, LimitsAreTheCallers) {
  const std::string bytes = GoodFile().Build();
  const auto code = [&](Limits limits) { return OpenBytes(bytes, limits).status().code(); };
  EXPECT_EQ(code({.kv_pairs_max = 3}), StatusCode::kOutOfRange);
  EXPECT_EQ(code({.tensors_max = 1}), StatusCode::kOutOfRange);
  EXPECT_EQ(code({.key_bytes_max = 4}), StatusCode::kOutOfRange);
  EXPECT_EQ(code({.string_bytes_max = 2}), StatusCode::kOutOfRange);
  EXPECT_EQ(code({.array_elements_max = 2}), StatusCode::kOutOfRange);
  EXPECT_EQ(code({.metadata_bytes_max = 100}), StatusCode::kOutOfRange);
  EXPECT_EQ(code({.dimension_max = 31}), StatusCode::kOutOfRange);
  EXPECT_EQ(code({.elements_max = 63}), StatusCode::kOutOfRange);
  EXPECT_EQ(code({}), StatusCode::kOk);
}

// A header cut anywhere is an error, never a crash.
TEST(GgufFileTest, EveryTruncationIsAnError) {
  const std::string bytes = GoodFile().Build();
  for (size_t length = 0; length < bytes.size(); ++length) {
    SCOPED_TRACE(length);
    const Expected<GgufFile> file = OpenBytes(bytes.substr(0, length));
    ASSERT_FALSE(file.ok());
    ASSERT_EQ(file.status().code(), StatusCode::kDataLoss) << file.status().message();
  }
}

// With any one header byte changed the file may be good or bad; what opens must be safe to read in full.
TEST(GgufFileTest, FlippedBytesNeverCrash) {
  const std::string good = GoodFile().Build();
  const size_t header_bytes = GoodFile().Header().size();
  std::vector<float> values(1 << 12);
  for (size_t at = 0; at < header_bytes; ++at) {
    for (const int mask : {0x01, 0x80, 0xff}) {
      std::string bytes = good;
      bytes[at] = static_cast<char>(static_cast<unsigned char>(bytes[at]) ^ mask);
      const Expected<GgufFile> file = OpenBytes(bytes);
      if (!file.ok()) continue;
      for (const Tensor& tensor : file->tensors()) {
        ASSERT_LE(tensor.elements(), static_cast<int64_t>(values.size()));
        ASSERT_TRUE(Dequantize(tensor, 0, tensor.rows(), values.data()).ok());
      }
    }
  }
}

TEST(GgufFileTest, ReadsARealModel) {
  const char* path = std::getenv("JOINTKV_MODEL");
  if (path == nullptr) GTEST_SKIP() << "JOINTKV_MODEL names no model file";
  const Expected<GgufFile> file = GgufFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status().ToString();
  EXPECT_FALSE(file->tensors().empty());
  EXPECT_GT(file->StringArraySize("tokenizer.ggml.tokens").value(), 0u);
  const Tensor* embedding = file->Find("token_embd.weight");
  ASSERT_NE(embedding, nullptr);
  std::vector<float> row(static_cast<size_t>(embedding->ne[0]));
  ASSERT_TRUE(Dequantize(*embedding, embedding->rows() - 1, 1, row.data()).ok());
  for (const float value : row) ASSERT_TRUE(std::isfinite(value));
}

}  // namespace
}  // namespace jointkv::gguf
