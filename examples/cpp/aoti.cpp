// Labels of a picture by a package of AOTInductor, without Python:
//
//   emanet-triton export CKPT --to aoti --part image-to-labels --out model.pt2
//   aoti model.pt2 street.ppm labels.pgm [RUNS]
//
// A package has machine code: load none that you do not trust.

#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <memory>

#include "labels.h"

using torch::inductor::AOTIModelPackageLoader;

static Network open_file(const std::string& file) {
  std::shared_ptr<AOTIModelPackageLoader> loader;
  try {
    loader = std::make_shared<AOTIModelPackageLoader>(file);
  } catch (const std::exception& error) {
    throw InputError(file + ": cannot be loaded: " + error.what());
  }
  auto metadata = loader->get_metadata();
  const at::Device device(metadata.at("AOTI_DEVICE_KEY"));  // "cpu" or "cuda"
  const auto labels = [loader, device](uint8_t* pixels, const Shape& shape) {
    c10::InferenceMode guard;
    const at::Tensor input = at::from_blob(pixels, shape, at::kByte).to(device);
    const at::Tensor output = loader->run({input}).at(0).cpu().contiguous();
    const auto* values = output.const_data_ptr<uint8_t>();
    return std::vector<uint8_t>(values, values + output.numel());
  };
  return {metadata[kDescription], labels};
}

int main(int count, char** arguments) { return run(count, arguments, open_file); }
