// `kvpack._core`: codecs on NumPy arrays, ISA control, build facts. Checks, allocates, calls; no arithmetic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "kvpack/codec.h"
#include "kvpack/isa.h"
#include "kvpack/pages.h"

namespace py = pybind11;

namespace {

using namespace kvpack;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

constexpr ssize_t tiles_of(ssize_t tokens) { return (tokens + kTile - 1) / kTile; }

Side side_of(int64_t side) {
  if (side != 0 && side != 1)
    throw std::invalid_argument("side is " + std::to_string(side) + "; allowed: 0 (key), 1 (value)");
  return static_cast<Side>(side);
}

PageLayout layout_from(const std::vector<int64_t>& v) {
  if (v.size() != 5)
    throw std::invalid_argument("layout has " + std::to_string(v.size()) +
                                " entries; it is [key_codec, key_dim, value_codec, value_dim, kv_heads]");
  return {v[0], v[1], v[2], v[3], v[4]};
}

// Tiles [n, tiles, side_bytes] and means [n, means, mean_bytes].
py::tuple encode(const py::array& array, int64_t codec, int64_t side) {
  if (array.ndim() != 3)
    throw std::invalid_argument("encode: x has " + std::to_string(array.ndim()) +
                                " dimensions; it is [n, tokens, head_dim]");
  const ssize_t n = array.shape(0), tokens = array.shape(1), d = array.shape(2);
  const SideLayout layout = layout_of(codec, d, side_of(side));
  // `exact` takes the elements as they are: float32, or uint16 that holds float16 or bfloat16 bits.
  const CodecCode code = CodecCode::unpack(codec);
  const bool elements = layout.bits == 0 && code.dtype != Dtype::f32;
  if (elements && array.itemsize() != 2)
    throw std::invalid_argument("encode: exact in 16 bits takes 2-byte elements (float16, or bfloat16 as uint16)");
  const py::array x =
      elements ? py::array::ensure(array, py::array::c_style) : static_cast<py::array>(Floats::ensure(array));
  if (!x) throw std::invalid_argument("encode: x cannot be read as a float32 array");
  const Dtype dtype = elements ? code.dtype : Dtype::f32;
  Bytes out({n, tiles_of(tokens), static_cast<ssize_t>(layout.bytes())});
  Bytes means({n, static_cast<ssize_t>(layout.means_of(tiles_of(tokens))), static_cast<ssize_t>(layout.mean_bytes())});
  const Vectors vectors{static_cast<const uint8_t*>(x.data()), dtype, d * dtype_bytes(dtype)};
  const PackedRows rows{out.mutable_data(), means.mutable_data()};
  {
    const py::gil_scoped_release release;
    encode_rows(vectors, n, tokens, codec, d, layout.side, rows);
  }
  return py::make_tuple(out, means);
}

py::array_t<float> decode(const Bytes& packed, const Bytes& means, int64_t codec, int64_t side, int64_t tokens,
                          int64_t head_dim) {
  const SideLayout layout = layout_of(codec, head_dim, side_of(side));
  if (packed.ndim() != 3 || packed.shape(2) != static_cast<ssize_t>(layout.bytes()) || tokens < 0 ||
      packed.shape(1) != tiles_of(tokens))
    throw std::invalid_argument("decode: packed is [n, " + std::to_string(tiles_of(tokens)) + ", " +
                                std::to_string(layout.bytes()) + "] for " + std::to_string(tokens) + " tokens");
  const ssize_t n = packed.shape(0), d = head_dim;
  if (means.ndim() != 3 || means.shape(0) != n || means.shape(1) != layout.means_of(packed.shape(1)) ||
      means.shape(2) != static_cast<ssize_t>(layout.mean_bytes()))
    throw std::invalid_argument("decode: means is [n, " + std::to_string(layout.means_of(packed.shape(1))) + ", " +
                                std::to_string(layout.mean_bytes()) + "]");
  py::array_t<float> out({n, static_cast<ssize_t>(tokens), d});
  auto* to = reinterpret_cast<uint8_t*>(out.mutable_data());
  const PackedRows rows{const_cast<uint8_t*>(packed.data()), const_cast<uint8_t*>(means.data())};
  const py::gil_scoped_release release;
  decode_rows(rows, n, tokens, codec, d, layout.side, to, Dtype::f32);
  return out;
}

py::array_t<float> rotate(const Floats& x, bool inverse) {
  if (x.ndim() != 2)
    throw std::invalid_argument("rotate: x has " + std::to_string(x.ndim()) + " dimensions; it is [n, head_dim]");
  py::array_t<float> out({x.shape(0), x.shape(1)});
  std::copy(x.data(), x.data() + x.size(), out.mutable_data());
  rotate_rows(out.mutable_data(), x.shape(0), x.shape(1), inverse);
  return out;
}

py::list registry() {
  py::list all;
  for (const CodecInfo& c : codecs()) {
    py::dict d;
    d["id"] = c.id;
    d["name"] = std::string(c.name);
    d["bits"] = c.bits;
    d["rotated"] = c.rotated;
    d["scale_rules"] = c.scale_rules;
    d["trellis"] = c.trellis;
    d["elements"] = c.elements;
    d["asymmetric"] = c.asymmetric;
    d["scale_block"] = c.scale_block;
    d["parts"] = c.parts;
    d["split"] = c.split;
    d["what"] = std::string(c.what);
    d["source"] = std::string(c.source);
    all.append(d);
  }
  return all;
}

py::dict build_info() {
  py::dict d;
  d["version"] = KVPACK_VERSION;
  d["architecture"] = KVPACK_ARCH;
  d["compiler"] = KVPACK_COMPILER;
  d["torch_operators"] = KVPACK_HAS_TORCH != 0;
  d["format_version"] = kFormatVersion;
  return d;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "kvpack's torch-free core: codecs on NumPy arrays, ISA control, build facts";
  m.attr("FORMAT_VERSION") = kFormatVersion;
  m.attr("TILE") = kTile;
  m.attr("PAGE_TILES") = kPageTiles;
  m.def("registry", &registry);
  m.def("build_info", &build_info);
  m.def(
      "side_bytes", [](int64_t codec, int64_t d, int64_t side) { return layout_of(codec, d, side_of(side)).bytes(); },
      py::arg("codec"), py::arg("head_dim"), py::arg("side"));
  m.def(
      "page_mean_bytes",
      [](int64_t codec, int64_t d, int64_t side) { return layout_of(codec, d, side_of(side)).page_means(); },
      py::arg("codec"), py::arg("head_dim"), py::arg("side"));
  m.def(
      "array_mean_bytes",
      [](int64_t codec, int64_t d, int64_t side, int64_t tiles) {
        const SideLayout layout = layout_of(codec, d, side_of(side));
        return layout.means_of(tiles) * static_cast<int64_t>(layout.mean_bytes());
      },
      py::arg("codec"), py::arg("head_dim"), py::arg("side"), py::arg("tiles"));
  m.def(
      "record_bytes", [](const std::vector<int64_t>& layout) { return layout_from(layout).record().bytes(); },
      py::arg("layout"));
  m.def(
      "page_bytes", [](const std::vector<int64_t>& layout) { return layout_from(layout).page_bytes(); },
      py::arg("layout"));
  m.def("encode", &encode, py::arg("x"), py::arg("codec"), py::arg("side"));
  m.def("decode", &decode, py::arg("packed"), py::arg("means"), py::arg("codec"), py::arg("side"), py::arg("tokens"),
        py::arg("head_dim"));
  m.def("rotate", &rotate, py::arg("x"), py::arg("inverse") = false);
  m.def("isa_available", &isa_available);
  m.def("isa_active", &isa_active);
  m.def("isa_use", &isa_use, py::arg("name"));
}
