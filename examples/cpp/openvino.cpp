// Labels of a picture by a file of ONNX or OpenVINO, without Python:
//
//   emanet-triton export CKPT --to onnx --part image-to-labels --out model.onnx
//   openvino model.onnx street.ppm labels.pgm [RUNS]

#include <openvino/openvino.hpp>

#include "labels.h"

static Network open_file(const std::string& file) {
  ov::Core core;
  std::shared_ptr<ov::Model> model;
  try {
    model = core.read_model(file);
  } catch (const std::exception&) {  // its text has several lines, of OpenVINO's source
    throw InputError(file + ": OpenVINO cannot read it");
  }
  const std::vector<std::string> key{"framework", kDescription};  // where ONNX metadata goes
  const auto text = model->has_rt_info(key) ? model->get_rt_info<std::string>(key) : "";

  // Otherwise OpenVINO computes in bfloat16 on processors that can.
  const auto precision = ov::hint::inference_precision(ov::element::f32);
  auto compiled = std::make_shared<ov::CompiledModel>(core.compile_model(model, "CPU", precision));
  const auto labels = [compiled](uint8_t* pixels, const Shape& shape) {
    ov::InferRequest request = compiled->create_infer_request();
    request.set_input_tensor({ov::element::u8, ov::Shape(shape.begin(), shape.end()), pixels});
    request.infer();
    const ov::Tensor output = request.get_output_tensor();
    const auto* values = output.data<const uint8_t>();
    return std::vector<uint8_t>(values, values + output.get_size());
  };
  return {text, labels};
}

int main(int count, char** arguments) { return run(count, arguments, open_file); }
