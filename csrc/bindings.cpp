// The only file that sees Python: `nemotron_h._native`.
//
// Tensors arrive as raw addresses (data_ptr()) and sizes, so the build needs no torch and a call costs 0.2-0.3 µs. The
// caller, src/nemotron_h/ops/<op>/native.py, answers for their validity.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <type_traits>
#include <vector>

#include "blocks.h"
#include "guard.h"
#include "kernels.h"
#include "pool.h"

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
    d["amx_works"] = f.amx_works;
    return d;
}

// How an argument of a kernel arrives from Python: an address, a number, or a code.
template <typename T>
struct Wire {
    using type = std::conditional_t<std::is_enum_v<T>, int, T>;
    static T take(type value) { return static_cast<T>(value); }
};
template <typename T>
struct Wire<T*> {
    using type = uintptr_t;
    static T* take(type value) { return address<T>(value); }
};

// The kernels of one level, as a Python object with one method per kernel.
class Table {
  public:
    explicit Table(const std::string& level) : level_(level), kernels_(find(level)) {}

    const std::string& level() const { return level_; }
    const Kernels& kernels() const { return kernels_; }

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

enum class Gil { keep, release };  // release: for kernels that take tens of microseconds or more

// One method of `Table` from a kernel's own signature.
template <Gil gil, typename Result, typename... Args>
void def_kernel(nb::class_<Table>& table, const char* name, Result (*Kernels::*member)(Args...) noexcept) {
    table.def(name, [member](const Table& self, typename Wire<Args>::type... args) -> Result {
        if constexpr (gil == Gil::release) {
            nb::gil_scoped_release unlocked;
            return (self.kernels().*member)(Wire<Args>::take(args)...);
        } else {
            return (self.kernels().*member)(Wire<Args>::take(args)...);
        }
    });
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "The C++ kernels of nemotron_h; use them through nemotron_h.ops.";
    m.attr("interface_version") = interface_version;
    m.attr("tile_kernels") = tile_kernels;
    m.def("levels", &levels, "The kernel levels that this CPU runs, lowest first.");
    m.def("cpu_features", &features, "Instruction sets that CPU and operating system allow: name to bool.");
    m.def("set_threads", &set_threads, "Threads of a parallel region, the caller among them.");
    m.def("threads", &threads);
    m.def("panel_bytes", [](int format, size_t cols, size_t group) {
        return panel_bytes(static_cast<Format>(format), cols, group);
    });
    m.def("linear_scratch", [](size_t M, size_t K, int format, int arithmetic) {
        return linear_scratch(M, K, static_cast<Format>(format), static_cast<Arithmetic>(arithmetic));
    });
    m.def("experts_scratch", [](size_t M, size_t k, size_t E, size_t L, size_t F, int format, int arithmetic) {
        return experts_scratch(M, k, E, L, F, static_cast<Format>(format), static_cast<Arithmetic>(arithmetic));
    });
    m.def("attention_prefill_scratch", &attention_prefill_scratch);
    m.def("advise_huge_pages", [](uintptr_t p, size_t bytes) { return advise_huge_pages(address<void>(p), bytes); });
    m.def("mamba_block_scratch", [](uintptr_t b, size_t rows) { return block_scratch(*address<const MambaBlock>(b), rows); });
    m.def("attention_block_scratch", [](uintptr_t b, size_t rows) { return block_scratch(*address<const AttentionBlock>(b), rows); });
    m.def("mlp_block_scratch", [](uintptr_t b, size_t rows) { return block_scratch(*address<const MlpBlock>(b), rows); });
    m.def("moe_block_scratch", [](uintptr_t b, size_t rows) { return block_scratch(*address<const MoeBlock>(b), rows); });
    bind_guard(m);
    nb::class_<Table> table(m, "Kernels", "The kernels of one level.");
    table.def(nb::init<const std::string&>(), nb::arg("level"))
        .def_prop_ro("level", &Table::level)
        .def("rms_norm", &Table::rms_norm);
    def_kernel<Gil::release>(table, "add", &Kernels::add);
    def_kernel<Gil::release>(table, "router", &Kernels::router);
    def_kernel<Gil::release>(table, "sample", &Kernels::sample);
    def_kernel<Gil::release>(table, "linear", &Kernels::linear);
    def_kernel<Gil::keep>(table, "decay_rate", &Kernels::decay_rate);
    def_kernel<Gil::release>(table, "mamba_step", &Kernels::mamba_step);
    def_kernel<Gil::release>(table, "mamba_block", &Kernels::mamba_block);
    def_kernel<Gil::release>(table, "attention_inputs", &Kernels::attention_inputs);
    def_kernel<Gil::release>(table, "attention_output", &Kernels::attention_output);
    def_kernel<Gil::release>(table, "mlp_block", &Kernels::mlp_block);
    def_kernel<Gil::release>(table, "moe_block", &Kernels::moe_block);
    def_kernel<Gil::release>(table, "experts", &Kernels::experts);
    def_kernel<Gil::release>(table, "pack", &Kernels::pack);
    def_kernel<Gil::release>(table, "ssd_step", &Kernels::ssd_step);
    def_kernel<Gil::release>(table, "ssd_scan", &Kernels::ssd_scan);
    def_kernel<Gil::release>(table, "causal_conv1d", &Kernels::causal_conv1d);
    def_kernel<Gil::release>(table, "gated_rms_norm", &Kernels::gated_rms_norm);
    def_kernel<Gil::release>(table, "time_step", &Kernels::time_step);
    def_kernel<Gil::release>(table, "attention", &Kernels::attention);
    def_kernel<Gil::release>(table, "attention_prefill", &Kernels::attention_prefill);
    def_kernel<Gil::release>(table, "with_room", &Kernels::with_room);
    def_kernel<Gil::release>(table, "peak", &Kernels::peak);
    m.attr("peak_sinks") = peak_sinks;
}
