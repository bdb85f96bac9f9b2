// Files that parse but are no model that this room can run: each is refused with the status and the name of what is
// wrong. Malformed files are gguf/'s subject.
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/thread_pool.h"
#include "gguf/gguf_writer_for_test.h"
#include "models/model.h"

namespace jointkv::models {
namespace {

using gguf::GgufWriter;

struct Shape {
  std::string name;
  std::vector<int64_t> ne;
};

// A whole one-layer model: d_model 64, 4 heads of 16, 2 KV heads, d_ff 128, 10 tokens.
std::vector<Shape> Shapes(const std::string& arch) {
  std::vector<Shape> shapes = {{"token_embd.weight", {64, 10}},    {"output_norm.weight", {64}},
                               {"output.weight", {64, 10}},        {"blk.0.attn_norm.weight", {64}},
                               {"blk.0.attn_q.weight", {64, 64}},  {"blk.0.attn_k.weight", {64, 32}},
                               {"blk.0.attn_v.weight", {64, 32}},  {"blk.0.attn_output.weight", {64, 64}},
                               {"blk.0.ffn_norm.weight", {64}},    {"blk.0.ffn_gate.weight", {64, 128}},
                               {"blk.0.ffn_up.weight", {64, 128}}, {"blk.0.ffn_down.weight", {128, 64}}};
  if (arch == "qwen3" || arch == "gemma3") {
    shapes.push_back({"blk.0.attn_q_norm.weight", {16}});
    shapes.push_back({"blk.0.attn_k_norm.weight", {16}});
  }
  if (arch == "gemma3") {
    shapes.push_back({"blk.0.post_attention_norm.weight", {64}});
    shapes.push_back({"blk.0.post_ffw_norm.weight", {64}});
  }
  return shapes;
}

GgufWriter Build(const std::string& arch, const std::vector<Shape>& shapes) {
  GgufWriter w;
  w.AddString("general.architecture", arch);
  w.AddU32(arch + ".block_count", 1);
  w.AddU32(arch + ".embedding_length", 64);
  w.AddU32(arch + ".context_length", 4096);
  w.AddU32(arch + ".feed_forward_length", 128);
  w.AddU32(arch + ".attention.head_count", 4);
  w.AddU32(arch + ".attention.head_count_kv", 2);
  w.AddF32(arch + ".attention.layer_norm_rms_epsilon", 1e-6f);
  for (const Shape& shape : shapes) w.AddTensorF32(shape.name, shape.ne, 0.5f);
  return w;
}

Status Load(const GgufWriter& w, const ModelOptions& options = {}) {
  const gguf::TempFile temp(w.Build());
  const auto file = gguf::GgufFile::Open(temp.path());
  if (!file.ok()) return file.status();
  ThreadPool pool(1);
  return Model::Load(*file, options, pool).status();
}

void ExpectRefused(const Status& status, StatusCode code, const std::vector<std::string>& parts) {
  EXPECT_EQ(status.code(), code) << status.ToString();
  for (const std::string& part : parts) {
    EXPECT_NE(status.message().find(part), std::string::npos) << "no \"" << part << "\" in: " << status.ToString();
  }
}

class LoaderTest : public testing::TestWithParam<const char*> {
 protected:
  std::string arch() const { return GetParam(); }
  // What real files of the architecture may lack.
  static bool Optional(const std::string& name) { return name == "output.weight"; }
};

TEST_P(LoaderTest, TheWholeModelLoads) {
  for (const dense::WeightsMemory memory : {dense::WeightsMemory::kPacked, dense::WeightsMemory::kLean}) {
    ModelOptions options;
    options.weights_memory = memory;
    options.max_rows = 8;
    const Status status = Load(Build(arch(), Shapes(arch())), options);
    EXPECT_TRUE(status.ok()) << status.ToString();
  }
}

TEST_P(LoaderTest, AnyMissingTensorIsNamed) {
  const std::vector<Shape> shapes = Shapes(arch());
  for (size_t i = 0; i < shapes.size(); ++i) {
    std::vector<Shape> without = shapes;
    without.erase(without.begin() + static_cast<ptrdiff_t>(i));
    const Status status = Load(Build(arch(), without));
    if (Optional(shapes[i].name)) {
      EXPECT_TRUE(status.ok()) << status.ToString();
    } else {
      ExpectRefused(status, StatusCode::kNotFound, {"'" + shapes[i].name + "'", "missing"});
    }
  }
}

TEST_P(LoaderTest, AnyWrongShapeIsNamed) {
  const std::vector<Shape> shapes = Shapes(arch());
  for (size_t i = 0; i < shapes.size(); ++i) {
    if (shapes[i].name == "token_embd.weight") continue;  // its rows are the vocabulary
    std::vector<Shape> wrong = shapes;
    wrong[i].ne.back() += 32;
    ExpectRefused(Load(Build(arch(), wrong)), StatusCode::kInvalidArgument,
                  {"'" + shapes[i].name + "'", "expected [", std::to_string(wrong[i].ne.back())});
    wrong[i] = shapes[i];
    wrong[i].ne.push_back(2);  // a dimension too many
    ExpectRefused(Load(Build(arch(), wrong)), StatusCode::kInvalidArgument, {"'" + shapes[i].name + "'"});
  }
}

TEST_P(LoaderTest, WrongBiasIsNamed) {
  for (const std::string name : {"blk.0.attn_q.bias", "blk.0.attn_v.bias", "blk.0.ffn_down.bias", "output.bias"}) {
    std::vector<Shape> shapes = Shapes(arch());
    shapes.push_back({name, {7}});
    ExpectRefused(Load(Build(arch(), shapes)), StatusCode::kInvalidArgument, {"'" + name + "'", "[7]"});
  }
}

INSTANTIATE_TEST_SUITE_P(All, LoaderTest, testing::Values("llama", "qwen2", "qwen3", "gemma3"),
                         [](const auto& test) { return std::string(test.param); });

struct Refusal {
  const char* name;
  const char* arch;
  std::function<void(GgufWriter&, std::vector<Shape>&)> spoil;
  StatusCode code;
  std::vector<std::string> message;
};

void PrintTo(const Refusal& refusal, std::ostream* out) { *out << refusal.name; }

class RefusalTest : public testing::TestWithParam<Refusal> {};

TEST_P(RefusalTest, NamesWhatIsWrong) {
  const Refusal& refusal = GetParam();
  std::vector<Shape> shapes = Shapes(refusal.arch);
  GgufWriter metadata = Build(refusal.arch, {});
  refusal.spoil(metadata, shapes);
  for (const Shape& shape : shapes) metadata.AddTensorF32(shape.name, shape.ne, 0.5f);
  ExpectRefused(Load(metadata), refusal.code, refusal.message);
}

void RetypeTensor(GgufWriter& w, std::vector<Shape>& shapes, const std::string& name, int32_t type) {
  std::erase_if(shapes, [&](const Shape& shape) { return shape.name == name; });
  w.AddTensor({name, {64, 64}, type, std::string(64 * 64 * 4, '\0'), {}, {}});
}

const Refusal kRefusals[] = {
    {"UnknownArchitecture",
     "mamba",
     [](GgufWriter&, std::vector<Shape>&) {},
     StatusCode::kUnsupported,
     {"architecture 'mamba'", "llama, qwen2, qwen3 and gemma3"}},
    {"GemmaTwo", "gemma2", [](GgufWriter&, std::vector<Shape>&) {}, StatusCode::kUnsupported, {"'gemma2'"}},
    {"ScaledMatrix",
     "llama",
     [](GgufWriter&, std::vector<Shape>& shapes) {
       shapes.push_back({"blk.0.attn_k.scale", {1}});
     },
     StatusCode::kUnsupported,
     {"tensor 'blk.0.attn_k.scale'"}},
    {"Experts",
     "llama",
     [](GgufWriter& w, std::vector<Shape>&) { w.AddU32("llama.expert_count", 8); },
     StatusCode::kUnsupported,
     {"experts", "8"}},
    {"PartialRotation",
     "llama",
     [](GgufWriter& w, std::vector<Shape>&) { w.AddU32("llama.rope.dimension_count", 8); },
     StatusCode::kUnsupported,
     {"llama.rope.dimension_count 8", "16"}},
    {"LongRope",
     "llama",
     [](GgufWriter&, std::vector<Shape>& shapes) {
       shapes.push_back({"rope_factors_long.weight", {8}});
     },
     StatusCode::kUnsupported,
     {"LongRoPE", "rope_factors_long.weight"}},
    {"FrequencyFactorsElsewhere",
     "qwen3",
     [](GgufWriter&, std::vector<Shape>& shapes) {
       shapes.push_back({"rope_freqs.weight", {8}});
     },
     StatusCode::kUnsupported,
     {"rope_freqs.weight", "qwen3"}},
    {"UnknownScaling",
     "qwen2",
     [](GgufWriter& w, std::vector<Shape>&) { w.AddString("qwen2.rope.scaling.type", "su"); },
     StatusCode::kUnsupported,
     {"qwen2.rope.scaling.type", "'su'"}},
    {"UnequalHeads",
     "qwen3",
     [](GgufWriter& w, std::vector<Shape>&) {
       w.AddU32("qwen3.attention.key_length", 16);
       w.AddU32("qwen3.attention.value_length", 32);
     },
     StatusCode::kUnsupported,
     {"16", "32"}},
    {"HugeHeads",
     "qwen3",
     [](GgufWriter& w, std::vector<Shape>&) {
       w.AddU32("qwen3.attention.key_length", 512);
       w.AddU32("qwen3.attention.value_length", 512);
     },
     StatusCode::kUnsupported,
     {"512", "256"}},
    {"AttentionSoftCap",
     "llama",
     [](GgufWriter& w, std::vector<Shape>&) { w.AddF32("llama.attn_logit_softcapping", 50); },
     StatusCode::kUnsupported,
     {"llama.attn_logit_softcapping", "50"}},
    {"NotCausal",
     "qwen3",
     [](GgufWriter& w, std::vector<Shape>&) { w.AddBool("qwen3.attention.causal", false); },
     StatusCode::kUnsupported,
     {"qwen3.attention.causal"}},
    {"TypeThatGgmlCannotExpand",
     "llama",
     [](GgufWriter& w, std::vector<Shape>& shapes) { RetypeTensor(w, shapes, "blk.0.attn_q.weight", GGML_TYPE_I32); },
     StatusCode::kUnsupported,
     {"'blk.0.attn_q.weight'", "i32"}},
    {"TypeThatGgmlDoesNotKnow",
     "llama",
     [](GgufWriter& w, std::vector<Shape>& shapes) { RetypeTensor(w, shapes, "blk.0.attn_q.weight", 999); },
     StatusCode::kUnsupported,
     {"'blk.0.attn_q.weight'", "999"}},
    {"FusedQkv",
     "llama",
     [](GgufWriter&, std::vector<Shape>& shapes) {
       std::erase_if(shapes, [](const Shape& shape) { return shape.name.starts_with("blk.0.attn_q"); });
       shapes.push_back({"blk.0.attn_qkv.weight", {64, 128}});
     },
     StatusCode::kNotFound,
     {"'blk.0.attn_q.weight'"}},
    {"MoreLayersThanTensors",
     "llama",
     [](GgufWriter& w, std::vector<Shape>&) { w.AddU32("llama.block_count", 2); },
     StatusCode::kNotFound,
     {"'blk.1.attn_norm.weight'"}},
    {"OtherWidthThanTheTensors",
     "gemma3",
     [](GgufWriter& w, std::vector<Shape>&) { w.AddU32("gemma3.feed_forward_length", 256); },
     StatusCode::kInvalidArgument,
     {"'blk.0.ffn_gate.weight'", "[64, 128]", "[64, 256]"}},
    {"EmptyModel",
     "llama",
     [](GgufWriter&, std::vector<Shape>& shapes) { shapes.clear(); },
     StatusCode::kNotFound,
     {"'token_embd.weight'"}},
};

INSTANTIATE_TEST_SUITE_P(All, RefusalTest, testing::ValuesIn(kRefusals),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace jointkv::models
