// The only file that sees Python: `nemotron_h._native`.
//
// Tensors arrive as raw addresses (data_ptr()) and sizes, so the build needs no torch and a call costs 0.2-0.3 µs. The
// caller, src/nemotron_h/ops/<op>/native.py, answers for their validity.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using namespace nemotron_h;

namespace {

const char* const level_names[level_count] = {"generic", "avx2", "avx512", "amx"};

// Long calls let other Python threads run; for short ones giving the lock back and forth would cost more than the work.
constexpr size_t gil_release_elements = 1 << 16;

template <typename T>
T* address(uintptr_t value) {
    return reinterpret_cast<T*>(value);
}

std::vector<std::string> levels() {
    return std::vector<std::string>(level_names, level_names + static_cast<int>(highest_level()) + 1);
}

nb::dict features() {
    const CpuFeatures& f = cpu_features();
    nb::dict d;
    d["avx2"] = f.avx2;
    d["fma"] = f.fma;
    d["avx512f"] = f.avx512f;
    d["avx512bw"] = f.avx512bw;
    d["avx512dq"] = f.avx512dq;
    d["avx512vl"] = f.avx512vl;
    d["avx512_vnni"] = f.avx512_vnni;
    d["avx512_bf16"] = f.avx512_bf16;
    d["amx_tile"] = f.amx_tile;
    d["amx_int8"] = f.amx_int8;
    d["amx_bf16"] = f.amx_bf16;
    d["amx_permission"] = f.amx_permission;
    return d;
}

// The kernels of one level, as a Python object with one method per kernel.
class Table {
  public:
    explicit Table(const std::string& level) : level_(level), kernels_(find(level)) {}

    const std::string& level() const { return level_; }

    void rms_norm(uintptr_t x, uintptr_t weight, uintptr_t out, size_t rows, size_t cols, size_t x_row_stride, float eps,
                  int x_dtype, int weight_dtype) const {
        auto run = [&] {
            kernels_.rms_norm(address<const void>(x), address<const void>(weight), address<void>(out), rows, cols,
                              x_row_stride, eps, static_cast<Dtype>(x_dtype), static_cast<Dtype>(weight_dtype));
        };
        if (rows * cols < gil_release_elements) return run();
        nb::gil_scoped_release unlocked;
        run();
    }

  private:
    static const Kernels& find(const std::string& level) {
        for (int i = 0; i <= static_cast<int>(highest_level()); ++i)
            if (level == level_names[i]) return kernels_of(static_cast<Level>(i));
        throw nb::value_error(("this CPU has no kernel level named " + level).c_str());
    }

    std::string level_;
    const Kernels& kernels_;
};

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "The C++ kernels of nemotron_h; use them through nemotron_h.ops.";
    m.attr("interface_version") = interface_version;
    m.def("levels", &levels, "The kernel levels that this CPU runs, lowest first.");
    m.def("cpu_features", &features, "Instruction sets that CPU and operating system allow: name to bool.");
    nb::class_<Table>(m, "Kernels", "The kernels of one level.")
        .def(nb::init<const std::string&>(), nb::arg("level"))
        .def_prop_ro("level", &Table::level)
        .def("rms_norm", &Table::rms_norm);
}
